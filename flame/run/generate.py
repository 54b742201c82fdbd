"""Continues a text with an exported model."""

from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers import PreTrainedTokenizerFast as Tokenizer
from transformers.generation.streamers import BaseStreamer

from flame.data.bos import before_prompt
from flame.models.loading import load_model


def load(folder: str, device: str) -> tuple[PreTrainedModel, Tokenizer]:
    """The exported model in ``folder``, ready to generate, and its tokenizer.

    Raises:
        UsageError: The model has weights that are not finite, or not all of them.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = load_model(folder).to(device).eval()  # pyright: ignore[reportArgumentType]  # transformers hides the signature of nn.Module.to
    # ignore the sampling settings of the folder
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    model.generation_config = GenerationConfig(
        **{name: getattr(model.generation_config, name) for name in ids}
    )
    return model, tokenizer


def encode(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Ids of a prompt: the tokens that training put before a text, then the text; at least one id.

    Tokens that the tokenizer adds after a text are left out, since the model would begin another text.
    """
    text = tokenizer(prompt, add_special_tokens=False).input_ids
    return [*before_prompt(tokenizer, "tokenizer"), *text] or [tokenizer.eos_token_id]  # pyright: ignore[reportReturnType]  # transformers types the ids of all special tokens alike; this one is an int


@torch.no_grad()
def write(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    streamer: BaseStreamer | None = None,
) -> torch.Tensor:
    """Token ids ``[T]`` of the prompt and its continuation.

    Args:
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer.
        prompt: Text to continue.
        max_new_tokens: Most tokens to write; eos ends earlier.
        temperature: 0 takes the likeliest token each time.
        top_k: Sample from this many of the likeliest tokens. Default: from all.
        top_p: Sample from the likeliest tokens that together have this probability. Default: from all.
        streamer: Gets the ids one by one.
    """
    ids = torch.tensor([encode(tokenizer, prompt)], device=model.device)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature:
        # transformers would sample from 50 tokens where top_k is None
        limits = {"top_k": top_k or 0, "top_p": 1.0 if top_p is None else top_p}
        sampling = {"do_sample": True, "temperature": temperature, **limits}
    return model.generate(  # pyright: ignore[reportCallIssue]  # every causal model of transformers has GenerationMixin's generate
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        streamer=streamer,
        **sampling,
    )[0]


def generate(
    folder: str,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int = 0,
    device: str = "cpu",
) -> str:
    """The prompt and its continuation by the exported model in ``folder``, as `write` makes it."""
    model, tokenizer = load(folder, device)
    torch.manual_seed(seed)
    ids = write(model, tokenizer, prompt, max_new_tokens=max_new_tokens, temperature=temperature)
    return tokenizer.decode(ids, skip_special_tokens=True)  # pyright: ignore[reportReturnType]  # one sequence decodes to one str
