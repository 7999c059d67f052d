"""Is the new model still the old one? Ways to look inside two encoders and compare what is there.

``attribute`` and ``compare`` say which tokens an output comes from, ``impact_matrix`` which token
depends on which, and ``segment`` and ``tree`` what structure such a matrix holds.
"""

from fastattn.diagnose.attribution import (
    Attribution,
    attribute,
    integrated_gradients,
    mean_pooled,
    similarity_to,
)
from fastattn.diagnose.comparison import Comparison, Pair, compare
from fastattn.diagnose.impact import Agreement, agreement, impact_matrix
from fastattn.diagnose.segmentation import (
    SegmentationScore,
    adjacent_impact,
    score_segmentation,
    segment,
    spans_of_words,
)
from fastattn.diagnose.treebank import (
    AttachmentScore,
    Sentence,
    chain,
    read_conllu,
    score_attachment,
)
from fastattn.diagnose.trees import tree

__all__ = [
    "Agreement",
    "AttachmentScore",
    "Attribution",
    "Comparison",
    "Pair",
    "SegmentationScore",
    "Sentence",
    "adjacent_impact",
    "agreement",
    "attribute",
    "chain",
    "compare",
    "impact_matrix",
    "integrated_gradients",
    "mean_pooled",
    "read_conllu",
    "score_attachment",
    "score_segmentation",
    "segment",
    "similarity_to",
    "spans_of_words",
    "tree",
]
