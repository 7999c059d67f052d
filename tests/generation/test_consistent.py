"""The kept set against brute force, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from fastattn.generation import ConsistentTopK, ConsistentTopP

EOS, VOCABULARY = 3, 20


def brute_force_top_k(scores: Tensor, k: int) -> set[int]:
    return set(sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))[:k])


def brute_force_top_p(scores: Tensor, p: float) -> set[int]:
    """V_mu = the first k_mu tokens, k_mu = min {k: the sum of the k largest is more than mu}."""
    probabilities = scores.double().softmax(-1)
    order = sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))
    kept: set[int] = set()
    for token in order:
        kept.add(token)
        if sum(float(probabilities[i]) for i in kept) > p:
            break
    return kept


@pytest.mark.parametrize("rule", ["k", "p"])
def test_kept_set_is_the_usual_one_and_the_end(rule: str, seed: int) -> None:
    ids = torch.zeros(1, 1, dtype=torch.long)
    for _ in range(50):
        scores = 4 * torch.randn(1, VOCABULARY, dtype=torch.float64).round(
            decimals=1
        )  # ties are common
        if rule == "k":
            k = int(torch.randint(1, VOCABULARY + 3, ()))
            got, want = ConsistentTopK(k, EOS)(ids, scores), brute_force_top_k(scores[0], k)
        else:
            p = float(torch.rand(()))
            got, want = ConsistentTopP(p, EOS)(ids, scores), brute_force_top_p(scores[0], p)
        kept = set(torch.nonzero(got[0] > -torch.inf).flatten().tolist())
        assert kept == want | {EOS}
        assert torch.equal(got[0, list(kept)], scores[0, list(kept)])


@pytest.mark.parametrize("p", [0.0, 0.3, 0.999999])
def test_rows_do_not_mix_and_forbidden_tokens_stay_so(p: float, seed: int) -> None:
    scores = torch.randn(5, VOCABULARY)
    scores[:, 7] = -torch.inf
    processor = ConsistentTopP(p, [EOS, 4])
    together = processor(torch.zeros(5, 1), scores)
    for row in range(5):
        alone = processor(torch.zeros(1, 1), scores[row : row + 1])
        assert torch.equal(together[row], alone[0])
        assert together[row, 7] == -torch.inf
        assert (together[row, [EOS, 4]] > -torch.inf).all()
    assert (scores[:, :7] > -torch.inf).all(), "the argument is left as it was"


def decoder() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=16, n_layer=1, n_head=2,
        bos_token_id=0, eos_token_id=EOS, pad_token_id=EOS,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


def test_generate_ends_though_the_usual_rule_never_does() -> None:
    """The end always has probability, but is never among the likeliest 2."""
    model = decoder()
    with torch.no_grad():
        model.lm_head = torch.nn.Linear(16, VOCABULARY)
        model.lm_head.weight.zero_()
        model.lm_head.bias.copy_(torch.arange(VOCABULARY) % 7 / 2.0)
        model.lm_head.bias[EOS] = 0.5
    prompt = torch.ones(40, 2, dtype=torch.long)
    options = {"do_sample": True, "max_new_tokens": 60}
    torch.manual_seed(1)
    usual = model.generate(prompt, top_k=2, **options)
    assert not (usual[:, 2:] == EOS).any()
    kept = model.generate(prompt, top_k=0, logits_processor=[ConsistentTopK(2, EOS)], **options)
    assert (kept[:, 2:] == EOS).any(1).double().mean() > 0.5


@pytest.mark.parametrize(
    "options",
    [{"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {"typical_p": 0.5}, {"epsilon_cutoff": 0.1}],
)
def test_a_second_truncation_is_refused(options: dict[str, float]) -> None:
    prompt = torch.ones(1, 2, dtype=torch.long)
    given = {"top_k": 0, "do_sample": True, "max_new_tokens": 3, **options}
    for processor in (ConsistentTopK(3, EOS), ConsistentTopP(0.5, EOS)):
        with pytest.raises(ValueError, match="truncates by itself, and .*LogitsWarper could cut"):
            decoder().generate(prompt, logits_processor=[processor], **given)
    given = {"top_k": 0, "do_sample": True, "max_new_tokens": 3, "temperature": 0.7}
    decoder().generate(prompt, logits_processor=[ConsistentTopP(0.5, EOS)], **given)


def test_another_end_than_that_of_generate_is_refused() -> None:
    prompt = torch.ones(1, 2, dtype=torch.long)
    given = {"top_k": 0, "do_sample": True, "max_new_tokens": 3}
    with pytest.raises(ValueError, match=rf"keeps \[7\], but generate ends at eos_token_id={EOS}"):
        decoder().generate(prompt, logits_processor=[ConsistentTopK(2, 7)], **given)
    several = ConsistentTopK(2, [7, EOS])
    decoder().generate(prompt, logits_processor=[several], **given)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConsistentTopK(0, EOS), "k must be an integer of at least 1; got 0"),
        (lambda: ConsistentTopK(1.5, EOS), "got 1.5"),
        (lambda: ConsistentTopP(1.0, EOS), r"p must be in \[0, 1\); got 1.0"),
        (lambda: ConsistentTopP(0.5, None), "eos_token_id must be a token id or several; got None"),
        (lambda: ConsistentTopP(0.5, True), "eos_token_id must be a token id or several; got True"),
        (lambda: ConsistentTopP(0.5, []), r"eos_token_id must be a token id or several; got \[\]"),
        (lambda: ConsistentTopK(1, 99)(None, torch.zeros(1, 9)), "vocabulary's 9; got .99"),
    ],
)
def test_arguments(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
