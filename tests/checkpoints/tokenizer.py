"""A small T5 tokenizer (Unigram) in the files that ``transformers`` loads, made from the text below."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

SPECIAL_TOKENS = ("<pad>", "</s>", "<s>", "<unk>")  # ids 0 to 3, as in UMT5
SPACE = "▁"

CORPUS = """
A cat and a dog bake a cake together in a bright kitchen. The cat measures the flour while the dog stirs the batter.
A red fox runs through deep snow at sunrise, slow motion, the camera follows from the side, soft golden light.
Waves break against a rocky shore in the evening; the sky is orange and purple, clouds move slowly, high quality.
A city street at night in the rain, people with umbrellas, neon signs reflected in the wet road, cinematic lighting.
An old man with a white beard sits by the fire and tells a story to three children. Close view of his hands and face.
The rocket rises from the ground in smoke and flame, then leaves the blue sky behind and turns toward the moon.
A green train crosses a stone bridge between mountains, birds fly over the river, wide shot, realistic, detailed.
Blurred, low quality, static picture, overexposed, worst quality, deformed hands, extra fingers, watermark, subtitles.
A woman in a yellow dress walks along the beach with her horse, wind in her hair, warm summer day, shallow focus.
Robots paint a large picture of a garden with flowers, trees and a small house; the style is watercolor on paper.
一只猫和一只狗在明亮的厨房里一起做蛋糕，猫在量面粉，狗在搅拌面糊。
一只红色的狐狸在日出时跑过深深的雪地，慢动作，镜头从侧面跟随，柔和的金色光线。
傍晚海浪拍打着岩石海岸，天空是橙色和紫色的，云慢慢移动，高质量，电影感。
雨夜的城市街道，人们打着雨伞，霓虹灯映在湿润的路面上，远处有一座桥。
老人坐在火边给三个孩子讲故事，特写他的手和脸。火箭从地面升起，飞向月球。
色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，丑陋的，残缺的，多余的手指，画得不好的手部，
画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走。
"""
# Any Latin text and common Chinese punctuation must come apart into known characters.
ALPHABET = [chr(code) for code in (*range(0x21, 0x7F), *range(0xA1, 0x180))] + list("，。！？；：、（）《》「」“”‘’…—")


def write_t5_tokenizer(folder: Path) -> int:
    """Write tokenizer files for ``AutoTokenizer`` and ``T5TokenizerFast`` to ``folder``; return the vocabulary size."""
    from transformers import T5TokenizerFast

    pieces = _pieces()
    tokenizer = T5TokenizerFast(tokenizer_object=_unigram(pieces), vocab=pieces, extra_ids=0, model_max_length=512)
    tokenizer.save_pretrained(folder)
    return len(pieces)


def _pieces() -> list[tuple[str, float]]:
    """Vocabulary with log probabilities: special tokens, then words, word parts and characters of the corpus.

    Counted instead of trained with the library's EM trainer: that one gives another order of ids in every process.
    """
    counts = Counter(dict.fromkeys([SPACE, *ALPHABET], 1))
    for word in CORPUS.split():
        marked = SPACE + word
        for length in range(1, 9):
            counts.update(marked[start : start + length] for start in range(len(marked) - length + 1))
    kept = {piece: count for piece, count in counts.items() if len(piece) == 1 or count >= 4}
    total = sum(kept.values())
    ordered = sorted(kept.items(), key=lambda item: (-item[1], item[0]))
    return [(token, 0.0) for token in SPECIAL_TOKENS] + [(p, round(math.log(n / total), 6)) for p, n in ordered]


def _unigram(pieces: list[tuple[str, float]]) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=SPECIAL_TOKENS.index("<unk>")))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", SPECIAL_TOKENS.index("</s>"))]
    )
    return tokenizer
