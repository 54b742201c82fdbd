"""Passkey retrieval: a random five-digit number is planted in filler text, and the model is asked for it at the end.

The texts are those of Mohtashami and Jaggi (arXiv:2305.16300). The length is that of the whole prompt, in
tokens of the model's tokenizer. `passkey_accuracy` lets the model write the key. `passkey_loss` is for models that are
too small to do so: the loss of the key, compared with the same text with another key and with none.
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerFast as Tokenizer

from flame.base.errors import UsageError
from flame.data.bos import before_prompt

# every piece but the first starts with a space, where byte-level BPE tokenizers split words, so that the ids of the
# pieces concatenate to those of the text
_INTRO = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it."
    " I will quiz you about the important information there."
)
_FILLER = (
    " The grass is green.",
    " The sky is blue.",
    " The sun is yellow.",
    " Here we go.",
    " There and back again.",
)
_NEEDLE = " The pass key is {key}. Remember it. {key} is the pass key."
_QUESTION = " What is the pass key? The pass key is"
# " 12345" is at most six tokens, and one more tells whether the number ends there
_NEW_TOKENS = 7
# tokens of the prompts of a batch: enough for a GPU, few enough for the references, which materialise all scores
_BATCH_TOKENS = 8192


@dataclass
class _Sample:
    """The parts of a sample's prompts that are the same at every length and depth."""

    key: str
    other_key: str
    last_sentence: int


def passkey_accuracy(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    length: int,
    *,
    depths: Sequence[float],
    samples: int,
    seed: int,
) -> dict[float, float]:
    """Share of the keys that the model writes, by greedy decoding with its cache.

    An answer counts if its first number equals the key. The keys are the same at every
    depth and length.

    Args:
        model: Anything with transformers' ``generate``, in evaluation mode.
        tokenizer: The model's tokenizer, which counts ``length``.
        length: Tokens of the prompt, from the beginning to the question's last word.
        depths: Position of the key in the filler, 0 at its beginning and 1 at its end, rounded to the nearest end of
            a sentence.
        samples: Number of keys, from 10000 to 99999.
        seed: Seed of the keys.

    Returns:
        Depth -> share, from 0 to 1.

    Raises:
        UsageError: A length too short for the texts, a depth outside 0 to 1, no depth, or no sample.
    """
    cases = draw(tokenizer, length, depths, samples, seed)
    shares = {}
    for depth in depths:
        correct = 0
        for batch in _batches(cases, length):
            ids = _stack(
                [_prompt(tokenizer, length, depth, case, case.key) for case in batch], model
            )
            written = model.generate(  # pyright: ignore[reportCallIssue]  # every causal model of transformers has GenerationMixin's generate
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=_NEW_TOKENS,
                do_sample=False,
                use_cache=True,
                pad_token_id=tokenizer.eos_token_id,
            )[:, length:]
            for case, answer in zip(batch, written, strict=True):
                text: str = tokenizer.decode(answer, skip_special_tokens=True)  # pyright: ignore[reportAssignmentType]  # one sequence decodes to one str
                number = re.match(r"\s*([0-9]+)", text)
                correct += number is not None and number[1] == case.key
        shares[depth] = correct / samples
    return shares


@torch.no_grad()
def passkey_loss(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    length: int,
    *,
    depths: Sequence[float],
    samples: int,
    seed: int,
) -> dict[float, dict[str, float]]:
    """Loss of the key as the answer, in nats for its five digits, mean over the samples.

    The loss is summed over the tokens that hold digits, so that tokenizers are comparable; a guess costs
    ln 90000 = 11.4. A model that retrieves has a lower loss ``with_key`` than with ``other_key``. A loss below that
    ``without_key`` alone says only that the needle makes digits likelier.

    The arguments are those of `passkey_accuracy`; ``model`` must take ``logits_to_keep``.

    Returns:
        Depth -> ``with_key``: the key is in the text, as `passkey_accuracy` asks for it; ``other_key``: the text holds
        another one; ``without_key``: the text is all filler, of the same length.
    """
    cases = draw(tokenizer, length, depths, samples, seed)

    def mean(depth: float, planted: Callable[[_Sample], str | None]) -> float:
        total = 0.0
        for batch in _batches(cases, length):
            prompts = [_prompt(tokenizer, length, depth, case, planted(case)) for case in batch]
            answers = [_encode(tokenizer, f" {case.key}") for case in batch]
            total += _loss_of(model, tokenizer, prompts, answers)
        return total / samples

    # nothing is planted, at any depth
    without_key = mean(0, lambda case: None)
    return {
        depth: {
            "with_key": mean(depth, lambda case: case.key),
            "other_key": mean(depth, lambda case: case.other_key),
            "without_key": without_key,
        }
        for depth in depths
    }


def _loss_of(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    answers: list[list[int]],
) -> float:
    """Sum of the losses of all tokens of the answers that hold a digit."""
    longest = max(map(len, answers))
    # no mask: the padding of a short answer comes after all tokens that count
    ids = _stack(
        [p + a + a[-1:] * (longest - len(a)) for p, a in zip(prompts, answers, strict=True)], model
    )
    # [B, longest, V]: the last one would predict what comes after the answer
    logits = model(ids, logits_to_keep=longest + 1).logits[:, :-1].float()
    loss = F.cross_entropy(logits.transpose(1, 2), ids[:, -longest:], reduction="none")
    counts = torch.tensor(
        [[i < len(a) and _has_digit(tokenizer, a[i]) for i in range(longest)] for a in answers],
        device=loss.device,
    )
    return loss[counts].double().sum().item()


def _has_digit(tokenizer: Tokenizer, token: int) -> bool:
    return any(character in "0123456789" for character in tokenizer.decode([token]))


def draw(
    tokenizer: Tokenizer, length: int, depths: Sequence[float], samples: int, seed: int
) -> list[_Sample]:
    """The samples of `passkey_accuracy`, which checks its arguments by drawing them.

    Raises:
        UsageError: As `passkey_accuracy`.
    """
    if not depths:
        raise UsageError("depths must name at least one depth")
    for depth in depths:
        if not 0 <= depth <= 1:
            raise UsageError(f"depths must lie between 0 and 1, got {depth}")
    if samples < 1:
        raise UsageError(f"samples must be at least 1, got {samples}")
    rng = random.Random(seed)
    cases = []
    for _ in range(samples):
        key, other_key = rng.sample(range(10_000, 100_000), 2)
        cases.append(_Sample(str(key), str(other_key), rng.randrange(len(_FILLER))))
    shortest = max(
        sum(len(part) for part in _fixed_parts(tokenizer, key))
        for case in cases
        for key in (case.key, case.other_key)
    )
    if length < shortest:
        raise UsageError(
            f"length must be at least {shortest} tokens of this tokenizer, for the task and the key, got {length}"
        )
    return cases


def _batches(cases: list[_Sample], length: int) -> Iterator[list[_Sample]]:
    size = max(1, _BATCH_TOKENS // length)
    for start in range(0, len(cases), size):
        yield cases[start : start + size]


def _prompt(
    tokenizer: Tokenizer, length: int, depth: float, case: _Sample, key: str | None
) -> list[int]:
    """``length`` tokens; without a ``key``, filler replaces the needle."""
    intro, needle, question = _fixed_parts(tokenizer, key)
    room = length - len(intro) - len(needle) - len(question)
    texts = [_encode(tokenizer, text) for text in _FILLER]
    # built from the end, so that the first sentence is the one that is cut
    sentences: list[list[int]] = []
    number, total = case.last_sentence, 0
    while total < room:
        sentence = texts[number % len(texts)][-(room - total) :]
        sentences.append(sentence)
        total += len(sentence)
        number -= 1
    sentences.reverse()
    ends = [0]
    for sentence in sentences:
        ends.append(ends[-1] + len(sentence))
    split = min(ends, key=lambda end: abs(end - depth * room))
    filler = [token for sentence in sentences for token in sentence]
    return intro + filler[:split] + needle + filler[split:] + question


def _fixed_parts(tokenizer: Tokenizer, key: str | None) -> tuple[list[int], list[int], list[int]]:
    """Intro, needle, which is empty without a key, and question."""
    return (
        before_prompt(tokenizer, "tokenizer") + _encode(tokenizer, _INTRO),
        _encode(tokenizer, _NEEDLE.format(key=key)) if key else [],
        _encode(tokenizer, _QUESTION),
    )


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def _stack(rows: list[list[int]], model: PreTrainedModel) -> torch.Tensor:
    """Ids ``[B, T]`` on the device of the model."""
    return torch.tensor(rows, device=model.device)
