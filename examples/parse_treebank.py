"""Dependencies out of an encoder that was never told of any, beside what they have to beat.

Impact matrices of a pretrained encoder, of the same encoder with random weights, and of zeros, each
decoded by Eisner's algorithm with the root given; and the two chains, over the whole treebank.

    python -m examples.parse_treebank --data en_pud.conllu
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

from examples.demo import encoder_folder
from fastattn.diagnose import Sentence, chain, impact_matrix, read_conllu, score_attachment, tree
from fastattn.recipes.progress import progress


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a CoNLL-U file")
    parser.add_argument("--sentences", type=int, default=60, help="to parse with the encoders")
    parser.add_argument("--longest", type=int, default=20, help="words of those")
    parser.add_argument("--layer", type=int, default=-1)
    options = parser.parse_args()
    if not options.data.is_file():
        parser.error(f"--data {options.data} is no file")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    treebank = read_conllu(options.data)
    few = [s for s in treebank if len(s.words) <= options.longest][: options.sentences]
    folder = encoder_folder()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    trained = transformers.AutoModel.from_pretrained(folder).eval()
    torch.manual_seed(0)
    untrained = transformers.AutoModel.from_config(trained.config).eval()

    table = Table(title="Root given, punctuation counted", title_justify="left")
    for column in ("parser", "words", "UAS", "UUAS"):
        table.add_column(column)

    def add(name: str, heads: list[list[int]], gold: list[Sentence]) -> None:
        score = score_attachment(heads, gold)
        table.add_row(name, str(score.words), f"{score.uas:.2f}", f"{score.uuas:.2f}")

    for gold, what in ((treebank, "all"), (few, "few")):
        for direction in ("right", "left"):
            add(f"{direction} chain, {what}", [chain(s, direction) for s in gold], gold)
    zeros = [tree(torch.zeros(len(s.words), len(s.words)), root=s.root) for s in few]
    add("zero matrix, few", zeros, few)
    for model, name in ((untrained, "random weights, few"), (trained, "pretrained, few")):
        heads = []
        with progress(name, len(few)) as advance:
            for sentence in few:
                matrix = impact(model, tokenizer, sentence.words, options.layer)
                heads.append(tree(matrix, root=sentence.root))
                advance()
        add(name, heads, few)
    Console().print(table)


def impact(
    model: torch.nn.Module,
    tokenizer: transformers.PreTrainedTokenizerBase,
    words: list[str],
    layer: int,
) -> torch.Tensor:
    """The impact of words on words: a word is all of its pieces."""
    encoded = tokenizer(words, is_split_into_words=True, return_tensors="pt")
    owners = encoded.word_ids(0)
    spans = [[i for i, owner in enumerate(owners) if owner == w] for w in range(len(words))]
    mask = tokenizer.mask_token_id
    return impact_matrix(model, encoded["input_ids"], mask, spans=spans, layer=layer)


if __name__ == "__main__":
    main()
