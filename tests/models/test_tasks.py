"""Tasks: one loss per example, that depends on that example alone."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional

from intramural.core.metrics import LOSS_SCALE
from intramural.models.batched_losses import merged
from intramural.models.tasks import IGNORED, Tokens
from intramural.models.training import evaluate
from tests.models.builders import Bench, Pair, bench, chapters, titles
from tests.tiny import LABELS, federation, generation


def make(kind: str, folder: Path, count: int = 12) -> Bench:
    if kind == "classification":
        return bench(federation(folder, model={"max_length": 16}), chapters(count))
    return bench(generation(folder, model={"max_length": 48}), titles(count))


@pytest.fixture(params=["classification", "generation"])
def on(request: pytest.FixtureRequest, bert: Path, llama: Path) -> Bench:
    made = make(request.param, bert if request.param == "classification" else llama)
    made.model.eval()
    return made


def test_losses_are_one_per_example_and_equal_a_loop_over_single_examples(on: Bench) -> None:
    everything = list(range(len(on.tokens)))
    assert len(set(on.tokens.lengths().tolist())) > 3  # so that there is padding to get wrong
    with torch.no_grad():
        losses = on.task.losses(on.model, on.task.pad(on.tokens, everything))
        single = [on.task.losses(on.model, on.task.pad(on.tokens, [i])) for i in everything]
    assert losses.shape == (len(everything),)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, torch.cat(single), rtol=0, atol=1e-5)


def test_a_loss_does_not_depend_on_the_batch_s_other_records(on: Bench) -> None:
    with torch.no_grad():
        first = on.task.losses(on.model, on.task.pad(on.tokens, [0, 1, 2]))
        other = on.task.losses(on.model, on.task.pad(on.tokens, [0, 9, 10, 11]))
    torch.testing.assert_close(first[0], other[0], rtol=0, atol=1e-5)


def test_classification_losses_equal_a_naive_loop(bert: Path) -> None:
    on = make("classification", bert)
    on.model.eval()
    with torch.no_grad():
        losses = on.task.losses(on.model, on.task.pad(on.tokens, list(range(12))))
        for record, loss in zip(chapters(12), losses, strict=True):
            ids = on.loaded.tokenizer(record.text, truncation=True, max_length=16)["input_ids"]
            logits = on.model(input_ids=torch.tensor([ids])).logits[0]
            expected = -functional.log_softmax(logits, dim=-1)[LABELS.index(record.target)]
            assert float(loss) == pytest.approx(float(expected), abs=1e-5)


def test_generation_losses_equal_a_naive_loop_over_the_response(llama: Path) -> None:
    on, tokenizer = make("generation", llama), make("generation", llama).loaded.tokenizer
    on.model.eval()
    with torch.no_grad():
        losses = on.task.losses(on.model, on.task.pad(on.tokens, list(range(12))))
        for record, loss in zip(titles(12), losses, strict=True):
            turn = [{"role": "user", "content": f"title of {record.text}"}]
            text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
            prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
            response = tokenizer(record.target, add_special_tokens=False)["input_ids"]
            response += [tokenizer.eos_token_id]
            assert len(prompt) + len(response) <= 48
            logits = on.model(input_ids=torch.tensor([prompt + response])).logits[0]
            odds = functional.log_softmax(logits, dim=-1)
            start = len(prompt) - 1  # the position that predicts the response's first token
            each = [float(odds[start + i, token]) for i, token in enumerate(response)]
            assert float(loss) == pytest.approx(-np.mean(each), abs=1e-5)


def test_generation_counts_the_response_alone(llama: Path) -> None:
    on = make("generation", llama)
    for ids, targets in zip(on.tokens.inputs, on.tokens.targets, strict=True):
        counted = targets != IGNORED
        assert counted.any()
        assert not counted[: int(np.argmax(counted))].any()
        assert counted[int(np.argmax(counted)) :].all()  # one run, up to the end
        np.testing.assert_array_equal(targets[counted], ids[counted])
        assert ids[-1] == on.loaded.tokenizer.eos_token_id


@pytest.mark.parametrize(("words", "kept"), [(1, 2), (100, 16)])
def test_a_long_pair_keeps_room_for_its_response(llama: Path, words: int, kept: int) -> None:
    config = generation(llama, model={"max_length": 32})
    # the prompt alone is over 32 tokens; a response of 100 words is cut to half of them
    on = bench(config, [Pair(text="code " * 60, target="unspecified " * words)])
    assert len(on.tokens.inputs[0]) == 32
    assert int((on.tokens.targets[0] != IGNORED).sum()) == kept


def test_a_prompt_without_a_chat_template_is_the_instruction_and_a_line_end(llama: Path) -> None:
    on = make("generation", llama)
    on.loaded.tokenizer.chat_template = None
    expected = on.loaded.tokenizer("title of F01\n")["input_ids"]
    assert on.task.prompt_ids("F01") == expected  # type: ignore[attr-defined]


def test_evaluation_sums_are_those_of_single_examples(on: Bench) -> None:
    training = on.config.training
    whole = evaluate(on.loaded, on.task, on.tokens, batch_size=5, training=training)
    ones = evaluate(on.loaded, on.task, on.tokens, batch_size=1, training=training)
    for name, count in whole.counts.items():
        if "loss" in name:
            np.testing.assert_allclose(count, ones.counts[name], atol=1e-4 * LOSS_SCALE)
        else:
            np.testing.assert_array_equal(count, ones.counts[name])
    assert whole.counts["examples"] == [12]
    if on.task.kind == "classification":
        assert whole.counts["confusion"].sum() == 12
    else:
        assert whole.counts["tokens"] == sum(int((t != IGNORED).sum()) for t in on.tokens.targets)


def test_a_response_counts_with_its_share_of_tokens_that_are_ranked_first(llama: Path) -> None:
    on, base = make("generation", llama), 1000

    def model(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        # ranks the next token first, but after each third position
        ahead = torch.roll(input_ids, -1, dims=1)
        missed = torch.arange(input_ids.shape[1]) % 3 == 0
        ahead = torch.where(missed, base - 1, ahead)
        return SimpleNamespace(logits=functional.one_hot(ahead, base).float())

    sums = on.task.measure(model, on.task.pad(on.tokens, range(12))).counts
    hits = shares = 0
    for targets in on.tokens.targets:
        response = [place for place in range(len(targets)) if targets[place] != IGNORED]
        right = sum((place - 1) % 3 != 0 for place in response)
        hits += right
        shares += round(right / len(response) * LOSS_SCALE)
    assert sums["hit_shares"].tolist() == [shares]
    assert sums["correct_tokens"].tolist() == [hits]
    # a mean of shares is not the share of all tokens, unless all responses are of one length
    assert shares / LOSS_SCALE / 12 != pytest.approx(hits / int(sums["tokens"][0]), abs=1e-3)


def test_a_response_is_written_greedily_and_without_the_prompt(llama: Path) -> None:
    on = make("generation", llama)
    on.model.eval()
    answers = {on.task.respond(on.model, "F01", tokens_max=4) for _ in range(2)}  # type: ignore[attr-defined]
    assert len(answers) == 1
    assert "title of" not in answers.pop()


def test_no_record_gives_no_tokens(on: Bench) -> None:
    assert len(on.task.tokenise([])) == 0


def test_a_matrix_of_tokens_says_what_its_rows_say() -> None:
    ids = np.arange(12, dtype=np.int32).reshape(4, 3)
    targets = np.array([[1], [0], [2], [1]], dtype=np.int32)
    for matrix, rows in (
        (Tokens(inputs=ids, targets=targets), Tokens(inputs=list(ids), targets=list(targets))),
        (
            merged([Tokens(inputs=ids[:1], targets=targets[:1])] * 2)[0],
            merged([Tokens(inputs=list(ids[:1]), targets=targets[:1])] * 2)[0],
        ),
    ):
        assert len(matrix) == len(rows)
        assert matrix.block is not None
        assert rows.block is not None
        assert matrix.block.dtype == rows.block.dtype == np.int64
        np.testing.assert_array_equal(matrix.block, rows.block)
        assert matrix.classes.dtype == rows.classes.dtype == np.int64
        np.testing.assert_array_equal(matrix.classes, rows.classes)
        assert matrix.lengths().tolist() == rows.lengths().tolist() == [3] * len(rows)


def test_clients_of_different_lengths_are_laid_end_to_end_row_by_row() -> None:
    parts = [np.zeros((2, 3), dtype=np.int32), np.ones((1, 2), dtype=np.int32)]
    whole, starts = merged([Tokens(inputs=part, targets=part[:, :1]) for part in parts])
    assert [row.tolist() for row in whole.inputs] == [[0, 0, 0], [0, 0, 0], [1, 1]]
    assert whole.classes.tolist() == [0, 0, 1]
    assert starts.tolist() == [0, 2]
    assert whole.block is None
