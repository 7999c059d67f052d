"""Heads on transformers decoders: training, greedy decoding, sampling and beams."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import fastattn
from fastattn.generation import SelfTerminatingHead, detach
from fastattn.models.attention import HEAD

EOS, PAD, VOCABULARY = 2, 0, 23
SETTINGS = [(kind, clock) for kind in ("nmst", "st") for clock in ("generated", "all")]


def decoder(scale: float = 3.0) -> Any:
    """A GPT-2 with weights so large that its logits differ from step to step."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=400, n_embd=32, n_layer=2, n_head=2,
        bos_token_id=1, eos_token_id=EOS, pad_token_id=PAD, initializer_range=0.3,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
    return model


def prompts() -> dict[str, Tensor]:
    """Two of them, the first padded on the left."""
    ids = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask}


def log_probs_of(
    head: SelfTerminatingHead, plain: Any, ids: Tensor, prompt: int, skip: int = 0
) -> Tensor:
    """Log-probabilities (tokens, V) of one sequence without padding, from the plain model."""
    with torch.no_grad():
        logits = plain(input_ids=ids[None, skip:]).logits
    started = torch.ones(logits.shape[:2], dtype=torch.bool)
    if head.clock == "generated":
        started[:, : prompt - skip - 1] = False
    return head.log_probs(logits, started)[0]


def test_an_end_that_only_the_generation_config_knows_comes_back(tmp_path: Path) -> None:
    model = decoder()
    model.config.eos_token_id = 20  # GPT-2's own is 50256, whatever the vocabulary
    model.generation_config.eos_token_id = EOS
    SelfTerminatingHead(EOS).attach(model)
    model.save_pretrained(tmp_path)
    loaded = fastattn.load(tmp_path)
    assert loaded.generation_config.eos_token_id == EOS
    with torch.no_grad():
        assert torch.equal(loaded(**prompts()).logits, model(**prompts()).logits)
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": 20}))
    with pytest.raises(ValueError, match="ends at token 2, but .* eos_token_id=20"):
        fastattn.load(tmp_path)


@pytest.mark.parametrize(("kind", "clock"), SETTINGS)
def test_greedy_steps_are_the_parallel_form(kind: str, clock: str) -> None:
    head, plain = SelfTerminatingHead(EOS, 0.02, kind, clock), decoder()
    model = head.attach(copy.deepcopy(plain))
    out = model.generate(
        **prompts(), do_sample=False, max_new_tokens=60,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    for row, skip in enumerate((3, 0)):
        tokens = out.sequences[row]
        ended = (tokens[7:] == EOS).nonzero()
        assert len(ended), "it ends"
        count = int(ended[0]) + 1
        assert count <= head.longest + 1
        want = log_probs_of(head, plain, tokens[: 7 + count], prompt=7, skip=skip)
        got = torch.stack([step[row] for step in out.logits[:count]])
        torch.testing.assert_close(got, want[6 - skip : -1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("kind", "clock"), SETTINGS)
@pytest.mark.parametrize("beams", [4])
def test_beam_scores_are_those_of_the_sequences(kind: str, clock: str, beams: int) -> None:
    """They are those of the parallel form only if the head's number follows its beam."""
    head, plain = SelfTerminatingHead(EOS, 0.02, kind, clock), decoder(scale=1.0)
    model = head.attach(copy.deepcopy(plain))
    out = model.generate(
        **prompts(), num_beams=beams, num_return_sequences=beams, do_sample=False,
        max_new_tokens=60, length_penalty=0.0, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    moved = False
    for row, (tokens, score) in enumerate(zip(out.sequences, out.sequences_scores, strict=True)):
        skip = 3 if row < beams else 0
        ended = (tokens[7:] == EOS).nonzero()
        assert len(ended), "it ends"
        count = int(ended[0]) + 1
        want = log_probs_of(head, plain, tokens[: 7 + count], prompt=7, skip=skip)
        chosen = want[6 - skip : -1].gather(1, tokens[7 : 7 + count, None])
        assert float(score) == pytest.approx(float(chosen.sum()), abs=1e-3)
        moved |= len(set(out.beam_indices[row, :count].tolist())) > 1
    assert moved, "beams changed places, so there was something to follow"


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", ["nmst", "st"])
def test_with_the_state_of_linear_attention(kind: str, beams: int) -> None:
    """The head's number is reordered with the constant-size state."""
    head, plain = SelfTerminatingHead(EOS, 0.02, kind), fastattn.linearize(decoder(1.0), "elu")
    model = head.attach(copy.deepcopy(plain))
    given = {name: value[1:] for name, value in prompts().items()}
    out = model.generate(
        **given, num_beams=beams, num_return_sequences=beams, do_sample=False,
        max_new_tokens=60, length_penalty=0.0, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    for row, tokens in enumerate(out.sequences):
        count = int((tokens[7:] == EOS).nonzero()[0]) + 1
        want = log_probs_of(head, plain, tokens[: 7 + count], prompt=7)[6:-1]
        chosen = want.gather(1, tokens[7 : 7 + count, None])
        if beams > 1:
            score = float(out.sequences_scores[row])
            assert score == pytest.approx(float(chosen.sum()), abs=1e-3)
        else:
            assert torch.equal(want.argmax(1), tokens[7 : 7 + count])


@pytest.mark.parametrize("kind", ["nmst", "st"])
def test_sampling_ends_with_truncation_by_generate(kind: str) -> None:
    model = SelfTerminatingHead(EOS, 0.02, kind).attach(decoder())
    torch.manual_seed(0)
    for options in ({"top_k": 2}, {"top_k": 0, "top_p": 0.2}, {"top_k": 0}):
        tokens = model.generate(**prompts(), do_sample=True, max_new_tokens=390 - 7, **options)
        assert (tokens[:, 7:] == EOS).any(1).all()


@pytest.mark.parametrize(("kind", "clock"), SETTINGS)
def test_training_loss(kind: str, clock: str) -> None:
    """The loss is the head's, of the same probabilities that are decoded."""
    head, plain = SelfTerminatingHead(EOS, 0.02, kind, clock), decoder()
    model = head.attach(copy.deepcopy(plain)).train()
    given = prompts()
    given["position_ids"] = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
    labels = given["input_ids"].clone()
    labels[0, :4] = -100  # what only padding comes before is no target
    labels[1, :4] = -100
    total, count = 0.0, 0
    for row, (skip, prompt) in enumerate(((3, 3), (0, 4))):
        ids = given["input_ids"][row]
        want = log_probs_of(head, plain, ids, prompt=max(prompt, skip + 1), skip=skip)
        for position in range(max(prompt, skip + 1), 7):
            total -= float(want[position - 1 - skip, ids[position]])
            count += 1
    assert count == 6
    loss = model(**given, labels=labels).loss
    assert loss.item() == pytest.approx(total / count, abs=1e-4)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    halved = model(**given, labels=labels, num_items_in_batch=torch.tensor(2 * count)).loss
    assert halved.item() == pytest.approx(total / count / 2, abs=1e-4)


@pytest.mark.parametrize(("kind", "clock"), SETTINGS)
def test_packed_texts_are_trained_like_texts_alone(kind: str, clock: str) -> None:
    head, lengths = SelfTerminatingHead(EOS, 0.02, kind, clock), (5, 1, 9, 4)
    logits = torch.randn(1, sum(lengths), VOCABULARY)
    labels = torch.randint(3, VOCABULARY, (1, sum(lengths)))
    labels[:, torch.tensor(lengths).cumsum(0) - 1] = EOS
    texts = zip(logits.split(lengths, 1), labels.split(lengths, 1), strict=True)
    alone = sum(head.loss(*text) * text[1].shape[1] for text in texts) / sum(lengths)
    torch.testing.assert_close(head.loss(logits, labels), alone)


@pytest.mark.parametrize(("kind", "clock"), SETTINGS)
def test_an_attached_head_counts_anew_after_an_end(kind: str, clock: str) -> None:
    head, plain = SelfTerminatingHead(EOS, 0.02, kind, clock), decoder()
    model = head.attach(copy.deepcopy(plain))
    ids = torch.randint(3, VOCABULARY, (2, 12))
    ids[0, 4] = ids[1, 7] = EOS
    with torch.no_grad():
        logits = plain(ids).logits
        scored = model(ids).logits
        trained = model(ids, labels=ids).logits
        read = model(ids, use_cache=True, logits_to_keep=1).logits
    for row, end in enumerate((4, 7)):
        first = head.log_probs(logits[row : row + 1, :end])
        second = head.log_probs(logits[row : row + 1, end:])
        want = torch.cat([first, second], 1)[0]
        torch.testing.assert_close(scored[row], want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(trained[row], want, atol=1e-5, rtol=1e-5)
        if clock == "all":
            torch.testing.assert_close(read[row, -1], want[-1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("where", ["argument", "configuration"])
def test_another_end_for_generate_is_noticed(where: str) -> None:
    model = SelfTerminatingHead(EOS, 0.1).attach(decoder())
    options = {"do_sample": False, "max_new_tokens": 100}
    if where == "argument":
        options["eos_token_id"] = 5
    else:
        model.generation_config.eos_token_id = 5
    with pytest.raises(ValueError, match="ended with the head's token 2 and decoding goes on"):
        model.generate(**prompts(), **options)


def test_a_classifier_made_of_a_model_with_a_head_is_loaded(tmp_path: Path) -> None:
    model = SelfTerminatingHead(EOS).attach(fastattn.linearize(decoder(), "elu"))
    model.save_pretrained(tmp_path / "decoder")
    classifier = transformers.GPT2ForSequenceClassification.from_pretrained(tmp_path / "decoder")
    classifier.save_pretrained(tmp_path / "classifier")
    loaded = fastattn.load(tmp_path / "classifier").eval()
    ids = prompts()["input_ids"]
    assert torch.equal(loaded(ids).logits, classifier.eval()(ids).logits)


def test_learns_where_to_end() -> None:
    """Texts of 5 tokens and an end: trained through the head, generation ends there."""
    model = SelfTerminatingHead(EOS, 1e-4).attach(decoder(1.0)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        ids = torch.randint(3, VOCABULARY, (32, 1)) * torch.ones(1, 6, dtype=torch.long)
        ids[:, 5] = EOS
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    tokens = model.eval().generate(torch.full((1, 1), 9), do_sample=False, max_new_tokens=30)
    assert tokens[0].tolist() == [9, 9, 9, 9, 9, EOS]


@pytest.mark.parametrize(("kind", "clock"), SETTINGS)
def test_scoring_is_parallel_though_models_make_a_cache_by_default(kind: str, clock: str) -> None:
    head = SelfTerminatingHead(EOS, 0.02, kind, clock)
    model, ids = head.attach(decoder()), prompts()["input_ids"][1:]
    with torch.no_grad():
        scored = model(input_ids=ids)
        expected = model(input_ids=ids, labels=ids).logits
        assert torch.equal(scored.logits, model(input_ids=ids, use_cache=False).logits)
        torch.testing.assert_close(scored.logits, expected)
        if clock == "generated":
            with pytest.raises(ValueError, match="scored its text.*use_cache=True"):
                model(input_ids=ids[:, -1:], past_key_values=scored.past_key_values)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_a_head_of_its_own(copied: Any) -> None:
    head = SelfTerminatingHead(EOS, 0.02)
    model, ids = head.attach(decoder()), prompts()["input_ids"]
    other = copied(model)
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids)
        assert torch.equal(other(input_ids=ids, labels=ids).loss, expected.loss)
        detach(other)
        assert torch.equal(model(input_ids=ids, labels=ids).loss, expected.loss)
        assert hasattr(model.config, HEAD) and not hasattr(other.config, HEAD)
        assert torch.equal(other(input_ids=ids).logits, decoder()(input_ids=ids).logits)
        detach(model)
        assert torch.equal(model(input_ids=ids).logits, decoder()(input_ids=ids).logits)


def test_scoring_without_a_cache_is_parallel() -> None:
    head, plain = SelfTerminatingHead(EOS, 0.02), decoder()
    model = head.attach(copy.deepcopy(plain))
    ids = prompts()["input_ids"][1:]
    with torch.no_grad():
        got = model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(got, head.log_probs(plain(input_ids=ids).logits))


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("kind", ["nmst", "st"])
def test_a_prompt_in_pieces_is_the_parallel_form(kind: str, padded: bool) -> None:
    """With the clock "all": the tokens of each piece count, also where one logit of it is kept."""
    model = SelfTerminatingHead(EOS, 0.05, kind, "all").attach(decoder())
    given = prompts()
    given["position_ids"] = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
    if not padded:
        given = {"input_ids": given["input_ids"][1:]}
    with torch.no_grad():
        want = model(**given, use_cache=False).logits[:, -1]
        for pieces in ([7], [4, 3], [2, 2, 2, 1]):
            cache, end = None, 0
            for piece in pieces:
                start, end = end, end + piece
                part = {name: value[:, start:end] for name, value in given.items()}
                if padded:
                    part["attention_mask"] = given["attention_mask"][:, :end]
                output = model(**part, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = output.past_key_values
                assert output.logits.shape[1] == 1 or kind == "st"
            torch.testing.assert_close(output.logits[:, -1], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["nmst", "st"])
def test_generate_in_pieces_and_in_a_continued_conversation(kind: str) -> None:
    model = SelfTerminatingHead(EOS, 0.05, kind, "all").attach(decoder())
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    prompt = prompts()["input_ids"][1:]
    want = model.generate(prompt, max_new_tokens=3, min_new_tokens=3, **options)
    pieces = {"prefill_chunk_size": 4, "max_new_tokens": 3, "min_new_tokens": 3}
    got = model.generate(prompt, **pieces, **options)
    torch.testing.assert_close(got.logits, want.logits, atol=1e-5, rtol=1e-5)
    more = torch.cat([want.sequences, want.sequences.new_full((1, 3), 9)], 1)
    fresh = model.generate(more, max_new_tokens=1, **options).logits
    again = {"past_key_values": want.past_key_values, "max_new_tokens": 1}
    continued = model.generate(more, **again, **options)
    torch.testing.assert_close(continued.logits, fresh, atol=1e-5, rtol=1e-5)


def test_detach_and_configuration(tmp_path: Path) -> None:
    plain = decoder()
    model = SelfTerminatingHead(EOS, 0.02).attach(copy.deepcopy(plain))
    saved = model.config.fastattn_self_terminating
    assert saved == {"eos_token_id": EOS, "epsilon": 0.02, "kind": "nmst", "clock": "generated"}
    given = {**prompts(), "do_sample": False, "max_new_tokens": 50}
    detach(model)
    assert torch.equal(model.generate(**given), plain.generate(**given))
    assert not hasattr(model.config, "fastattn_self_terminating")
    ids = prompts()["input_ids"]
    assert model(input_ids=ids, labels=ids).loss == plain(input_ids=ids, labels=ids).loss
    with pytest.raises(ValueError, match="has no self-terminating head"):
        detach(model)
    model.save_pretrained(tmp_path)
    assert "fastattn" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize(("kind", "clock"), SETTINGS)
def test_a_saved_head_comes_back(tmp_path: Path, kind: str, clock: str, linear: bool) -> None:
    plain = fastattn.linearize(decoder(1.0), "elu") if linear else decoder()
    model = SelfTerminatingHead(EOS, 0.02, kind, clock).attach(plain)
    given = {**prompts(), "do_sample": False, "max_new_tokens": 60}
    if linear:
        given = {**given, "input_ids": prompts()["input_ids"][1:], "attention_mask": None}
    want, ids = model.generate(**given), prompts()["input_ids"]
    loss = model(input_ids=ids, labels=ids).loss
    model.save_pretrained(tmp_path / "one")
    loaded = fastattn.load(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "two")  # what was loaded is saved as whole as the first
    for again in (
        loaded,
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "two"),
        transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "one"),
    ):
        assert torch.equal(again.generate(**given), want)
        torch.testing.assert_close(again(input_ids=ids, labels=ids).loss, loss)
        assert again.config.fastattn_self_terminating == model.config.fastattn_self_terminating
        with pytest.raises(ValueError, match="already"):
            SelfTerminatingHead(EOS).attach(again)
    bare = transformers.GPT2Model.from_pretrained(tmp_path / "two")  # its states have no end
    torch.testing.assert_close(
        bare(ids).last_hidden_state, model.transformer(ids).last_hidden_state
    )


def test_without_fastattn_a_saved_head_is_refused(tmp_path: Path) -> None:
    """In a process that never imports fastattn the model would be a plain softmax model."""
    SelfTerminatingHead(EOS).attach(decoder()).save_pretrained(tmp_path)
    load = f"import transformers; transformers.GPT2LMHeadModel.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert 'attn_implementation="fastattn_self_terminating"` is not supported' in done.stderr


def test_linearising_keeps_the_guard(tmp_path: Path) -> None:
    model = SelfTerminatingHead(EOS).attach(decoder())
    fastattn.restore(fastattn.linearize(model, "elu")).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["attn_implementation"] == "fastattn_self_terminating"
    assert hasattr(fastattn.load(tmp_path), "_fastattn_head")
    damaged = {**config, "fastattn_self_terminating": {"epsilon": 0.1}}
    (tmp_path / "config.json").write_text(json.dumps(damaged))
    with pytest.raises(ValueError, match="damaged field 'fastattn_self_terminating'"):
        fastattn.load(tmp_path)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="below the model's vocabulary of 23; got 99"):
        SelfTerminatingHead(99).attach(decoder())
    head = SelfTerminatingHead(EOS)
    model = head.attach(decoder())
    with pytest.raises(ValueError, match="already"):
        head.attach(model)
    with pytest.raises(ValueError, match="ends at token 5, but .* eos_token_id=2"):
        SelfTerminatingHead(5).attach(decoder())
    with pytest.raises(NotImplementedError, match="needs a causal language model; got BertModel"):
        head.attach(transformers.BertModel(transformers.BertConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
        )))  # fmt: skip
    with pytest.raises(ValueError, match="use_cache=True"):
        model.generate(**prompts(), use_cache=False, do_sample=False, max_new_tokens=3)
    one = {name: value[1:] for name, value in prompts().items()}
    with pytest.raises(ValueError, match="generated one by one"):
        model.generate(**one, prefill_chunk_size=3, do_sample=False, max_new_tokens=3)
    with pytest.raises(NotImplementedError, match="continuous batching"):
        model.generate_batch([[4, 5]], max_new_tokens=3)
    with pytest.raises(NotImplementedError, match="needs return_dict=True"):
        model(**one, return_dict=False)
    with pytest.raises((ValueError, NotImplementedError), match="one by one|take tokens back"):
        model.generate(**one, prompt_lookup_num_tokens=3, max_new_tokens=20, do_sample=False)
    done = model.generate(**one, do_sample=False, max_new_tokens=3, return_dict_in_generate=True)
    with pytest.raises(NotImplementedError, match="can't take tokens back"):
        done.past_key_values.crop(2)
    counting = SelfTerminatingHead(EOS, clock="all").attach(decoder())
    square = torch.ones(1, 1, 7, 7, dtype=torch.bool).tril()
    with pytest.raises(NotImplementedError, match=r"padding mask of shape \(batch, tokens\)"):
        counting(one["input_ids"], attention_mask=square)
