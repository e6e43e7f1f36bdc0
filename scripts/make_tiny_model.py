"""Builds the tiny Qwen2-VL in data/tiny and trains it from scratch on generated charts until it can read.

It is the model that the demo fine-tunes and the tests load: the real architecture, processor and chat template, 2.5 million
parameters. What it learns here is reading, in a language of its own: "read" writes every bar as `name value`, a NAME amid random
words answers `value!`, a VALUE answers `name!`, most and least answer `name!`, "say WORDS" repeats. It never sees a question of
data/sample, nor its subjects, nor its style of answer: those are what LoRA teaches it.

    python scripts/make_tiny_model.py --out data/tiny --hours 2
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from charts import BAR_COLORS, PAPER_COLORS, UNIT, Style, Written, draw_chart, spelled, width_of
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional
from transformers import Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

CONTROL_TOKENS = [f"<|{name}|>" for name in (
    "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end "
    "vision_start vision_end vision_pad image_pad video_pad"
).split()]  # fmt: skip
QWEN_SPLIT = (  # the pre-tokenizer of every Qwen2 tokenizer
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (  # Qwen2-VL's
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content or 'image_url' "
    "in content %}{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}Picture {{ image_count.value }}: "
    "{% endif %}<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NEAR = 6  # letters that a picture's token is asked for: two before it, its own two, two after it
CODES = 128  # ASCII; 0 where there is no letter
LETTERS_KNOWN = 0.15  # nats a letter: the vision tower alone is trained until then
MANY_FINDS = 5  # from so many look-ups on, the whole chart is not read as well
HEADS_FIRST = 60  # steps in which only the new heads learn, when training goes on from a model
FOUND_LETTERS = 5  # of an answer, that the last token of the key in the request is asked for
NAME_LETTERS, VALUE_LETTERS = 4, 5  # of a bar's name and value, that its last token is asked for
COMMANDS = "read find most least say".split()
WORDS = sorted({  # whole-word tokens, each with its leading space
    *COMMANDS,
    *"""a above after among an animal are area as at average away been best bird board body book bridge building by calories
    car championship chart city club come common contain country day deep degrees depth diameter did distance do does drive
    element end energy equal far fast fastest fewest field film first food for found from full game go goal gold grams
    greatest group had half has have heaviest height held high highest hours how in into is island it its kilometres lake
    language large largest last length letter light lightest live long longest lowest made main make many mass medals melt
    members metres miles million minutes money mountain national need new north number of often old on one or over part
    people per percent phrase planet play played player players point points population president question ran rate reach
    record release river run score scored sea season second series set ship shortest shown single size slowest smallest
    sound south space span speed sport square stand star state strings surface take tall tallest team temperature test that
    the them there these thousand time times titles to top total tower train unit up used using value watched water what
    which wide win wins with won word words world year years""".split(),
})  # fmt: skip
SPELT = (  # words that requests hold besides, letter by letter like every word that is no token
    """about across age all along also always am and answer any back be bear because before begin below better between big
    both bottom brought build built but can capital carry case center century charge children class close coast cold color
    count course cross cup current date density down duration each early earth east ever every face feature final five
    following form four general give great ground grow heat heavy help higher his home hour hundred if just keep kept key
    kilometers know land larger later lead learn level life like line liters longer low lower man match maximum mean measure
    medium meters middle month moon more move much name nation near next night not now numbers off only open order other out
    own parts period person place power present prize produce quarter range right road round same see seven share short
    shorter show side six sky small smaller so some spot start stood story street such taller tell ten than their then they
    thing this three title together took town track tree two under until use values vehicle very way weight west when where
    while who whose width will without work would young your"""
).split()
NOUNS = ["user", "assistant", "system", "You"]


def make_tokenizer() -> Tokenizer:
    """Byte-level BPE: 256 bytes, WORDS as chains of merges that begin with a space, Qwen's control tokens.

    Because a chain begins with a space and a lower-case letter, the names in a chart stay letters: reading them is spelling.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: index for index, piece in enumerate(alphabet)}
    merges = []
    for word in ["Ġ" + word for word in WORDS + ["helpful", "assistant"]] + NOUNS:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocab:
                vocab[word[:end]] = len(vocab)
                merges.append((word[: end - 1], word[end - 1]))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(_regex(QWEN_SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    return tokenizer


def _regex(pattern: str):
    from tokenizers import Regex

    return Regex(pattern)


def make_processor() -> Qwen2VLProcessor:
    """The real Qwen2-VL processor around the tiny tokenizer; pictures of 4 to 256 tokens."""
    tokenizer = Qwen2Tokenizer(
        tokenizer_object=make_tokenizer(),
        unk_token=None,
        bos_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=CONTROL_TOKENS[1:],
        model_max_length=32768,
    )
    size = {"shortest_edge": 4 * UNIT**2, "longest_edge": 256 * UNIT**2}
    return Qwen2VLProcessor(
        Qwen2VLImageProcessor(size=size), tokenizer, Qwen2VLVideoProcessor(size=size), chat_template=CHAT_TEMPLATE
    )


def make_model(processor: Qwen2VLProcessor, seed: int) -> Qwen2VLForConditionalGeneration:
    """Random weights; text head_dim 64, since vLLM's CPU attention accepts no smaller one."""
    token = processor.tokenizer.convert_tokens_to_ids
    torch.manual_seed(seed)
    config = Qwen2VLConfig(
        text_config=dict(
            vocab_size=-(-len(processor.tokenizer) // 64) * 64,
            hidden_size=192,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=3,
            num_key_value_heads=3,
            max_position_embeddings=32768,
            rms_norm_eps=1e-6,
            # Fast angles for the order of the text and the rows of a picture; half of a head hardly turns and compares letters,
            # however far apart they stand. The columns are told apart by the vision tower.
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 14, 16]},
            bos_token_id=token("<|endoftext|>"),
            eos_token_id=token("<|im_end|>"),
            pad_token_id=token("<|endoftext|>"),
        ),
        vision_config=dict(embed_dim=128, depth=2, num_heads=2, hidden_size=192, mlp_ratio=2),
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    model = Qwen2VLForConditionalGeneration(config)
    with torch.no_grad():  # filters that sum to zero do not see plain paper, which is most of a picture
        filters = model.model.visual.patch_embed.proj.weight
        filters -= filters.mean(dim=(2, 3, 4), keepdim=True)
    model.generation_config.eos_token_id = token("<|im_end|>")
    model.generation_config.pad_token_id = token("<|endoftext|>")
    return model


class Turn(NamedTuple):
    """A request and its answer; `key_end`: where in the request the name or value ends that is looked up, 0 if none is."""

    ask: str
    answer: str
    key_end: int = 0


class Charts:
    """Invented charts: names from syllables and from letter chains, values of one to five digits."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self.follows: dict[str, list[str]] = {}
        for word in WORDS + SPELT:
            padded = f"^^{word}$"
            for at in range(2, len(padded)):
                self.follows.setdefault(padded[at - 2 : at], []).append(padded[at])

    def word(self) -> str:
        rng = self.rng
        if rng.random() < 0.5:
            count = rng.choice([1, 2, 2, 3, 3])
            onset, vowel = "b c d f g h j k l m n p r s t v w y z ch sh th br tr st gr pl kr qu x".split(), "aeiou"
            return "".join(
                rng.choice(onset) * (rng.random() < 0.9) + rng.choice(vowel) + rng.choice(["", "", *"nrlstmdkgpcyx"])
                for _ in range(count)
            )
        pair, letters = "^^", ""
        while len(letters) < 12 and (letter := rng.choice(self.follows[pair])) != "$":
            letters, pair = letters + letter, pair[1] + letter
        return letters

    def name(self, longest: int) -> str:
        rng = self.rng
        kind = rng.random()
        if kind < 0.04:
            text = str(rng.randint(1900, 2030))
        elif kind < 0.10:
            letters = "".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(rng.randint(1, 4)))
            text = letters + rng.choice(["", "", str(rng.randint(1, 99)), "-" + str(rng.randint(1, 9)), " " + self.word()])
        elif kind < 0.65:
            text = self.word().capitalize()
        else:
            joint = rng.choices([" ", "-", " of ", ". ", " & ", "'", " the "], [70, 6, 6, 4, 3, 2, 3])[0]
            text = self.word().capitalize() + joint + rng.choice([self.word().capitalize(), self.word(), str(rng.randint(1, 20))])
        return text[:longest].strip(" -&'.") or "Om"

    def value(self) -> float:
        digits = self.rng.choices([1, 2, 3, 4, 5], [15, 32, 28, 20, 5])[0]
        number = self.rng.randint(10 ** (digits - 1), 10**digits - 1)
        return number / 10 if self.rng.random() < 0.35 and digits < 5 else number

    def values(self, kind: str, bars: int, longest: int) -> dict[str, float]:
        """Distinct names of up to `longest` letters, and values; in a column chart no wider than that."""
        chart: dict[str, float] = {}
        top = self.value()
        magnitude = top > 20 and self.rng.random() < 0.5  # half of the charts hold values of one order of magnitude
        while len(chart) < bars:
            name, value = self.name(longest), self.value()
            if magnitude and not top / 30 <= value <= top * 2:
                value = round(top * self.rng.uniform(0.05, 1), 1 if top != int(top) else 0)
            if kind == "column" and len(spelled(value)) > longest:
                continue
            if name not in chart and value not in chart.values() and value > 0:
                chart[name] = value
        return chart

    def salad(self, most: int) -> str:
        def word() -> str:
            return self.rng.choices([self.rng.choice(WORDS), self.rng.choice(SPELT), self.word()], [70, 18, 12])[0]

        words = [word() for _ in range(self.rng.randint(0, most))]
        return " ".join(word for word in words if word not in COMMANDS)

    def talk(self, chart: dict[str, float], finds: int) -> list[Turn]:
        """Turns over one chart: `finds` look-ups, then the whole chart if they are few."""
        rng = self.rng
        names = list(chart)
        asks = [("most", max(chart, key=chart.get)), ("least", min(chart, key=chart.get))]
        asks += [(name, spelled(chart[name])) for name in names] + [(spelled(chart[name]), name) for name in names]
        turns = []
        for key, answer in rng.sample(asks, min(finds, len(asks))):
            opening = "find" if rng.random() < 0.5 else (self.salad(1) or "tell").capitalize()
            before = f"{opening} {self.salad(10)}".strip()
            if key in chart and rng.random() < 0.2:
                before = f"{before} {rng.randint(1900, 2030)},"
            before = f"{before} {key}"
            tail = rng.choice(["", "", "'s", ",", "."]) if key in chart else ""
            after = f"{tail} {self.salad(6)}".rstrip() + rng.choice(["", "?"])
            if rng.random() < 0.5:
                after = f"{after} {self.salad(10).capitalize()}".rstrip() + rng.choice(["", "."])
            turns.append(Turn(before + after, f"{answer}!", len(before)))
        if finds < MANY_FINDS:
            turns.append(Turn("read", "\n".join(f"{name} {spelled(value)}" for name, value in chart.items())))
        return turns

    def batch(self, size: int) -> tuple[list, list[list[Turn]], list[list[Written]]]:
        """`size` pictures of one width and height, what is said about each, and what is written on each."""
        rng = self.rng
        kind = rng.choices(["bar", "label", "column"], [45, 30, 25])[0]
        longest, bars = (rng.randint(4, 7), rng.randint(2, 4)) if kind == "column" else (rng.randint(3, 17), rng.randint(2, 5))
        width = width_of(kind, {"x" * longest: 1, **{str(number): 1 for number in range(bars - 1)}})
        width += UNIT * rng.randint(0, 2) * (kind != "column")
        finds = rng.choice([0, 3, MANY_FINDS, MANY_FINDS])  # one number for the batch, so that little of it is padding
        pictures, talks, texts = [], [], []
        for _ in range(size):
            chart = self.values(kind, bars, longest)
            title = (self.salad(4).capitalize() + rng.choice(["", " (M)", " (2020)"]))[: (width - 2) // 6]
            texts.append([])
            style = Style(kind, width, rng.randrange(len(BAR_COLORS)), rng.randrange(len(PAPER_COLORS)))
            pictures.append(draw_chart(title, chart, style, texts[-1].append))
            talks.append(self.talk(chart, finds))
        return pictures, talks, texts


def letters_of(texts: list[Written], rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What two throw-away heads are asked under the picture's tokens: codes, 0 for no letter, -100 for not asked.

    (rows * columns, NEAR): the two letters before the token, its own two, the two after. Asked to name them, the vision tower learns letters
    in minutes; from the answers alone it takes hours to begin. Titles are not asked for.
    (rows * columns, NAME_LETTERS + VALUE_LETTERS): under the tokens of a bar's second text, how its name and its value begin.
    It makes the language model join name and value while it reads.
    """
    cells = numpy.zeros((rows, columns * 2 + NEAR - 2), int)
    joined = numpy.full((rows, columns, NAME_LETTERS + VALUE_LETTERS), -100)
    first = None
    for text, column, row in texts:
        cells[row, column + 2 : column + 2 + len(text)] = [ord(letter) * (letter != " ") for letter in text]
        if first is None:
            first = text, row
            continue
        name, value = (first[0], text) if row == first[1] else (text, first[0])  # a column's value stands above its name
        joined[row, column // 2 : (column + len(text) + 1) // 2] = codes_of(name, NAME_LETTERS) + codes_of(value, VALUE_LETTERS)
        first = None
    near = numpy.stack([cells[:, at : at + columns * 2 : 2] for at in range(NEAR)], -1)
    return torch.from_numpy(near.reshape(-1, NEAR)), torch.from_numpy(joined.reshape(rows * columns, -1))


def codes_of(text: str, number: int) -> list[int]:
    """Codes of the first `number` letters, 0 for a space and past the end."""
    return [ord(letter) * (letter != " ") for letter in text[:number].ljust(number)]


class Writer:
    """Turns talks into padded training tensors, picture tokens included."""

    def __init__(self, processor: Qwen2VLProcessor):
        self.processor = processor
        self.ids = lambda text: processor.tokenizer(text)["input_ids"]
        self.pad = processor.tokenizer.pad_token_id
        self.picture = processor.image_token_id
        self.head = self.ids("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n")

    def talk(self, turns: list[Turn], picture_tokens: int) -> tuple[list[int], list[int], list[tuple[int, list[int]]]]:
        """ids, labels, and (place of a key's last token, codes of how its answer begins)."""
        ids, keys = list(self.head), []
        if picture_tokens:
            ids += self.ids("<|vision_start|>") + [self.picture] * picture_tokens + self.ids("<|vision_end|>")
        labels = [-100] * len(ids)
        for number, turn in enumerate(turns):
            start = "\n<|im_start|>user\n" if number else ""
            if turn.key_end:
                place = len(ids) + len(self.ids(start + turn.ask[: turn.key_end])) - 1
                keys.append((place, codes_of(turn.answer.rstrip("!"), FOUND_LETTERS)))
            asked = self.ids(f"{start}{turn.ask}<|im_end|>\n<|im_start|>assistant\n")
            said = self.ids(turn.answer + "<|im_end|>")
            ids += asked + said
            labels += [-100] * len(asked) + said
        return ids, labels, keys

    def pixels(self, pictures: list) -> dict[str, torch.Tensor]:
        """pixel_values (P, D) and image_grid_thw (N, 3), as the processor makes them of pictures of one size, but quickly.

        D is of one of the two equal frames only; see `fast_patch_embedding`.
        """
        images = self.processor.image_processor
        mean, std = (numpy.array(value, "float32") for value in (images.image_mean, images.image_std))
        pixels = (numpy.stack([numpy.asarray(picture) for picture in pictures]).astype("float32") / 255 - mean) / std
        count, height, width, _ = pixels.shape
        patches = pixels.reshape(count, height // UNIT, 2, 14, width // UNIT, 2, 14, 3).transpose(0, 1, 4, 2, 5, 7, 3, 6)
        grid = torch.tensor([[1, height // 14, width // 14]]).expand(count, -1)
        return {"pixel_values": torch.from_numpy(patches.reshape(-1, 3 * 14 * 14)), "image_grid_thw": grid}

    def batch(self, pictures: list, talks: list) -> dict[str, torch.Tensor]:
        inputs = self.pixels(pictures) if pictures else {}
        tokens = int(inputs["image_grid_thw"][0].prod()) // 4 if pictures else 0
        written = [self.talk(turns, tokens) for turns in talks]
        longest = max(len(ids) for ids, _, _ in written)
        inputs["input_ids"] = torch.tensor([ids + [self.pad] * (longest - len(ids)) for ids, _, _ in written])
        inputs["labels"] = torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels, _ in written])
        keys = [(row, place, codes) for row, (_, _, keys) in enumerate(written) for place, codes in keys]
        if keys:
            inputs["key_places"] = torch.tensor([(row, place) for row, place, _ in keys])
            inputs["found"] = torch.tensor([codes for _, _, codes in keys])
        return inputs


class Batches(torch.utils.data.IterableDataset):
    """Training batches without end, made in another process."""

    def __init__(self, seed: int, size: int, processor: Qwen2VLProcessor):
        self.charts, self.size, self.writer = Charts(seed), size, Writer(processor)

    def __iter__(self):
        while True:
            if self.charts.rng.random() < 0.05:
                yield self.writer.batch(
                    [], [[Turn(f"say {text}", text)] for text in (sayable(self.charts) for _ in range(self.size))]
                )
                continue
            pictures, talks, texts = self.charts.batch(self.size)
            inputs = self.writer.batch(pictures, talks)
            asked = [letters_of(written, pictures[0].height // UNIT, pictures[0].width // UNIT) for written in texts]
            inputs["near"], inputs["joined"] = (torch.stack(part) for part in zip(*asked, strict=True))
            yield inputs


def positions(model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """(3, B, S). Every sequence of a batch has its picture at the same place, so one row serves for all."""
    ids = inputs["input_ids"]
    if "image_grid_thw" not in inputs:
        return torch.arange(ids.shape[1]).expand(3, *ids.shape)
    kinds = (ids[:1] == model.config.image_token_id).int()
    row, _ = model.model.get_rope_index(ids[:1], kinds, inputs["image_grid_thw"][:1])
    return row.expand(-1, ids.shape[0], -1)


def fast_patch_embedding(model) -> None:
    """A convolution whose kernel is its stride is one matmul, and on a CPU an order of magnitude faster as one.

    A picture's two frames are equal, so their filters are added. Undone by `del model.model.visual.patch_embed.forward`.
    """
    conv = model.model.visual.patch_embed.proj
    model.model.visual.patch_embed.forward = lambda patches: functional.linear(patches, conv.weight.sum(2).flatten(1))


def training_loss(
    model, heads: torch.nn.ModuleList, inputs: dict[str, torch.Tensor], letters_only: bool
) -> dict[str, torch.Tensor]:
    """Losses by name: letters (under each picture token), joined (name and value of a bar), found (under a key), talk."""
    losses, features = {}, None
    if "near" in inputs:
        seen = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True)
        features = {"image": seen}
        named = heads[0](torch.cat(seen.pooler_output)).float().view(-1, CODES)
        weight = torch.ones(CODES)
        weight[0] = 0.1  # most cells are empty
        losses["letters"] = functional.cross_entropy(named, inputs["near"].flatten(), weight)
    if letters_only:
        return losses
    taught = functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    out = model.model(
        input_ids=inputs["input_ids"], position_ids=positions(model, inputs), use_cache=False, mm_encoder_outputs=features,
        output_hidden_states=True,
    )  # fmt: skip
    if features:
        pictures = inputs["input_ids"] == model.config.image_token_id
        joined = inputs["joined"].flatten(0, 1)
        asked = joined[:, 0] != -100
        named = heads[1](out.hidden_states[2][pictures][asked]).float().view(-1, CODES)
        losses["joined"] = functional.cross_entropy(named, joined[asked].flatten())
    if "found" in inputs:
        rows, places = inputs["key_places"].T
        named = heads[2](out.hidden_states[3][rows, places]).float().view(-1, CODES)
        losses["found"] = functional.cross_entropy(named, inputs["found"].flatten())
    keep = taught != -100
    losses["talk"] = functional.cross_entropy(model.lm_head(out.last_hidden_state[keep]).float(), taught[keep])
    return losses


@torch.no_grad()
def accuracy(model, processor: Qwen2VLProcessor, charts: Charts, batches: int) -> dict[str, float]:
    """Share of charts transcribed whole, of their rows, and of look-ups answered, on charts never trained on."""
    model.eval()
    tokenizer = processor.tokenizer
    counts = {"charts": [0, 0], "rows": [0, 0], "find_value": [0, 0], "find_name": [0, 0], "find_most_least": [0, 0]}

    def answer(pictures, prompts):
        """All prompts of a call have the same picture size; generated one by one, so no padding enters."""
        texts = []
        for picture, prompt in zip(pictures, prompts, strict=True):
            content = [{"type": "image"}, {"type": "text", "text": prompt}]
            text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            inputs = processor(text=[text], images=[picture], return_tensors="pt")
            out = model.generate(**inputs, max_new_tokens=160, do_sample=False)
            texts.append(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
        return texts

    def count(key, good):
        counts[key][0] += bool(good)
        counts[key][1] += 1

    for _ in range(batches):
        pictures, talks, _ = charts.batch(4)
        for picture, turns in zip(pictures, talks, strict=True):
            for (ask, wanted, _), got in zip(turns, answer([picture] * len(turns), [turn.ask for turn in turns]), strict=True):
                if ask == "read":
                    count("charts", got == wanted)
                    for row, true in zip(got.split("\n") + [""] * 9, wanted.split("\n"), strict=False):
                        count("rows", row == true)
                elif " most" in ask or " least" in ask:
                    count("find_most_least", got == wanted)
                elif any(letter.isalpha() for letter in wanted):
                    count("find_name", got == wanted)
                else:
                    count("find_value", got == wanted)
    model.train()
    return {key: round(good / total, 3) if total else None for key, (good, total) in counts.items()}


def rate(progress: float) -> float:
    """Learning rate as a share of its peak: warm-up, plateau, linear decay over the last third."""
    return min(1.0, progress / 0.01) if progress < 0.65 else max(0.02, (1 - progress) / 0.35)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hours", type=float, default=2.0, help="training time; 0 writes random weights")
    parser.add_argument("--start", type=Path, help="go on from this model instead of random weights")
    parser.add_argument("--batch", type=int, default=32, help="pictures a step")
    parser.add_argument("--peak-rate", type=float, default=1.5e-3)
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16: faster on a CPU that has it")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    processor = make_processor()
    model = Qwen2VLForConditionalGeneration.from_pretrained(args.start) if args.start else make_model(processor, args.seed)
    fast_patch_embedding(model)
    torch.manual_seed(args.seed)
    heads = torch.nn.ModuleList(
        torch.nn.Linear(model.config.text_config.hidden_size, asked * CODES)
        for asked in (NEAR, NAME_LETTERS + VALUE_LETTERS, FOUND_LETTERS)
    )
    parameters = [*model.parameters(), *heads.parameters()]
    groups = [{"params": list(part.parameters())} for part in (model, heads)]
    optimizer = torch.optim.AdamW(groups, lr=args.peak_rate, betas=(0.9, 0.98), weight_decay=0.05)
    heads_group = optimizer.param_groups[1]
    print(f"{model.num_parameters():,} parameters, {len(processor.tokenizer)} tokens")

    def save(**facts) -> None:
        del model.model.visual.patch_embed.forward
        model.save_pretrained(args.out)
        processor.save_pretrained(args.out)
        facts = {"seed": args.seed, "hours": args.hours, "pictures": pictures_seen, **facts}
        (args.out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")

    start = last_saved = time.time()
    step = pictures_seen = 0
    letters_only = not args.start
    means: dict[str, float] = {}
    model.train()
    batches = iter(torch.utils.data.DataLoader(Batches(args.seed, args.batch, processor), batch_size=None, num_workers=1))
    while (progress := (time.time() - start) / max(1e-9, args.hours * 3600)) < 1:
        inputs = next(batches)
        if letters_only and "near" not in inputs:
            continue
        for group in optimizer.param_groups:
            group["lr"] = args.peak_rate * rate(progress) * (group is heads_group or not args.start or step >= HEADS_FIRST)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            losses = training_loss(model, heads, inputs, letters_only)
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, pictures_seen = step + 1, pictures_seen + len(inputs.get("near", ()))
        if "near" in inputs:
            means |= {name: 0.97 * means.get(name, loss.item()) + 0.03 * loss.item() for name, loss in losses.items()}
        letters_only = letters_only and not (step > 40 and means["letters"] < LETTERS_KNOWN)
        if step % 50 == 0:
            seconds = time.time() - start
            shown = "  ".join(f"{name} {mean:.4f}" for name, mean in means.items())
            print(
                f"{seconds:7.0f} s  step {step:6}  pictures {pictures_seen:8,}  {pictures_seen / seconds:5.1f}/s  {shown}",
                flush=True,
            )
        if time.time() - last_saved > 900:
            save()
            print(accuracy(model, processor, Charts(args.seed + 1), 3), flush=True)
            fast_patch_embedding(model)
            last_saved = time.time()
    save()
    if args.hours:
        measured = accuracy(model, processor, Charts(args.seed + 1), 60)
        fast_patch_embedding(model)
        save(accuracy_on_unseen_charts=measured)
        print(json.dumps(measured))


def sayable(charts: Charts) -> str:
    words = [
        charts.rng.choice([charts.name(17), charts.salad(4), spelled(charts.value())]) for _ in range(charts.rng.randint(1, 4))
    ]
    return " ".join(word for word in words if word) or "Om"


if __name__ == "__main__":
    main()
