"""A deep hierarchical VAE (NVAE) whose long-range mixer is linear attention: fastattn beyond text.

``python -m examples.nvae`` trains it; docs/nvae.md says what it is and what came out.
"""
