"""Benchmarks: ``python -m bench``, or ``make bench``.

``cases`` says what is measured, ``peers`` against whom, ``runner`` how (correctness first, then
interleaved timing), ``limits`` what the machine could do at best, ``floors`` what we promise;
``report`` and ``plots`` show it, ``publish`` writes it into README and docs.
"""
