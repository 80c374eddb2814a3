"""Generation: supervised fine-tuning of a causal language model on (text, response) pairs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from intramural.core.metrics import Sums, fixed_point
from intramural.models.tasks import IGNORED, Batch, PairLike, Tokens, pad_inputs


class Generation:
    """Next-token loss on the response only; an example's loss is the mean over its own tokens."""

    kind = "generation"
    padded = True

    def __init__(self, tokenizer: Any, *, instruction: str, length_max: int) -> None:
        self._tokenizer = tokenizer
        self._instruction = instruction
        self._length_max = length_max

    def tokenise(self, records: Sequence[PairLike]) -> Tokens:
        """Return prompt and response as one sequence; targets are `IGNORED` on the prompt.

        A pair over the longest length keeps up to half of it for the response; the prompt is cut
        first, then the response.
        """
        inputs, targets = [], []
        for record in records:
            prompt = self.prompt_ids(record.text)
            end = [self._tokenizer.eos_token_id]
            response = self._tokenizer(record.target, add_special_tokens=False)["input_ids"] + end
            kept = min(len(response), self._length_max // 2)
            prompt = prompt[: self._length_max - kept]
            response = response[: self._length_max - len(prompt)]
            inputs.append(np.array(prompt + response, dtype=np.int32))
            targets.append(np.array([IGNORED] * len(prompt) + response, dtype=np.int32))
        return Tokens(inputs=inputs, targets=targets)

    def prompt_ids(self, text: str) -> list[int]:
        """Return the prompt's token ids, in the chat template when the tokenizer has one."""
        turn = self._instruction.replace("{text}", text)
        if not self._tokenizer.chat_template:
            return list(self._tokenizer(turn + "\n")["input_ids"])
        rendered = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": turn}], add_generation_prompt=True, tokenize=False
        )
        return list(self._tokenizer(rendered, add_special_tokens=False)["input_ids"])

    def pad(self, tokens: Tokens, indices: Sequence[int]) -> Batch:
        """Return one batch; `targets` has shape `(batch, longest)`, `IGNORED` where padded."""
        batch = pad_inputs(tokens, indices, filler=self._tokenizer.pad_token_id)
        targets = np.full(tuple(batch["input_ids"].shape), IGNORED, dtype=np.int64)
        for row, index in enumerate(indices):
            targets[row, : len(tokens.targets[index])] = tokens.targets[index]
        batch["targets"] = torch.from_numpy(targets)
        return batch

    def losses(self, model: Any, batch: Batch) -> Tensor:
        """Return each pair's mean negative log-likelihood a response token, shape `(batch,)`."""
        tokens, _, rows = self._token_losses(model, batch)
        zeros = tokens.new_zeros(len(batch["input_ids"]))
        return zeros.index_add(0, rows, tokens) / torch.bincount(rows, minlength=len(zeros))

    def measure(self, model: Any, batch: Batch) -> Sums:
        """Return sums over examples (loss, hit_shares, examples) and over tokens (the rest)."""
        tokens, hits, rows = self._token_losses(model, batch)
        per_token = tokens.double().cpu().numpy()
        owners, right = rows.cpu().numpy(), hits.cpu().numpy()
        lengths = np.bincount(owners)
        examples = np.bincount(owners, weights=per_token) / lengths
        sums = {
            "loss": fixed_point(examples),
            "examples": len(examples),
            "token_loss": fixed_point(per_token),
            "tokens": len(per_token),
            "correct_tokens": int(right.sum()),
            "hit_shares": fixed_point(np.bincount(owners, weights=right) / lengths),
        }
        return Sums(counts={name: np.array([n], dtype=np.int64) for name, n in sums.items()})

    def _token_losses(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return loss, hit and owning example of each response token, each of shape `(tokens,)`.

        Only those positions are turned into float32 and normalised: prompts are most of a batch.
        """
        output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        wanted = batch["targets"][:, 1:]
        counted = wanted != IGNORED
        logits, wanted = output.logits[:, :-1][counted].float(), wanted[counted]
        losses = functional.cross_entropy(logits, wanted, reduction="none")
        return losses, logits.argmax(-1) == wanted, counted.nonzero()[:, 0]

    def respond(self, model: Any, text: str, *, tokens_max: int) -> str:
        """Return the model's greedy response to one text."""
        ids = torch.tensor([self.prompt_ids(text)], device=model.device)
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens_max,
                do_sample=False,
                pad_token_id=self._tokenizer.pad_token_id,
            )
        answer: str = self._tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        return answer.strip()
