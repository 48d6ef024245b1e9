"""A small Mistral tokenizer (byte-level BPE) with its chat template, in the files ``PixtralProcessor`` loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.checkpoints.tokenizer import CORPUS

# Ids 0 to 19, as in Mistral's own vocabulary.
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")
SPECIAL_TOKENS += ("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]")
SPECIAL_TOKENS += ("[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]")
NAMED_TOKENS = {"unk": "<unk>", "bos": "<s>", "eos": "</s>", "pad": "<pad>"}
VOCAB_SIZE = 700

# The message layout of Mistral Small 3.1: system prompt and turns between their tokens, no spaces, no line breaks.
CHAT_TEMPLATE = """\
{%- macro text(content) %}
    {%- if content is string %}{{ content }}
    {%- else %}
        {%- for part in content %}{{ part['text'] if part['type'] == 'text' else '[IMG]' }}{%- endfor %}
    {%- endif %}
{%- endmacro %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}{{ '[SYSTEM_PROMPT]' + text(message['content']) + '[/SYSTEM_PROMPT]' }}
    {%- elif message['role'] == 'user' %}{{ '[INST]' + text(message['content']) + '[/INST]' }}
    {%- else %}{{ text(message['content']) + eos_token }}
    {%- endif %}
{%- endfor %}
"""
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def write_processor(folder: Path) -> int:
    """Write the files of a ``PixtralProcessor`` to ``folder``; return the vocabulary size."""
    tokenizer = _trained()
    processor(tokenizer).save_pretrained(folder)
    return tokenizer.get_vocab_size()


def processor(tokenizer: Tokenizer) -> Any:
    """``PixtralProcessor`` around ``tokenizer``, with the settings of Mistral Small 3.1 and prompts padded in front."""
    from transformers import PixtralImageProcessor, PixtralProcessor, PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{f"{name}_token": token for name, token in NAMED_TOKENS.items()},
        padding_side="left",
        model_max_length=131072,
    )
    image_processor = PixtralImageProcessor(patch_size={"height": 14, "width": 14}, size={"longest_edge": 1540})
    return PixtralProcessor(
        image_processor=image_processor,
        tokenizer=fast,
        patch_size=14,
        spatial_merge_size=2,
        chat_template=CHAT_TEMPLATE,
    )


def _trained() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS.splitlines(), trainer)
    return tokenizer
