"""Builds the tiny Qwen2-VL in data/tiny and trains it from scratch on generated charts until it can read.

It is the model that the demo fine-tunes and the tests load: the real architecture, processor and chat template, 2 million
parameters. What it learns here is reading, in a language of its own: "read" writes every bar as `name value`, "find NAME"
answers `[value]`, "find VALUE" answers `[name]`, "find most" and "find least" answer `[name]`, "say WORDS" repeats. It never
sees a question of data/sample, nor its subjects, nor its style of answer: those are what LoRA teaches it.

    python scripts/make_tiny_model.py --out data/tiny --hours 2
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
from charts import BAR_COLORS, COLUMN_CELLS, PAPER_COLORS, UNIT, Style, Written, draw_chart, spelled
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
LEVELS = [(1, 1, 0), (2, 1, 0), (3, 1, 0), (5, 1, 0), (8, 1, 0), (8, 2, 0), (12, 3, 2), (17, 5, 4)]  # letters, bars, look-ups
SLOTS = 8  # the cells of letters in a picture's token, 4 x 2
LETTERS = 128  # ASCII; 0 where a slot is empty
LETTERS_KNOWN = 0.12  # nats a slot: the vision tower alone is trained until then, on full charts
PASSED = 0.7  # nats a token: below it the next level begins
COMMANDS = "read find most least say".split()
WORDS = sorted(set(  # whole-word tokens, each with its leading space; every other word is spelt letter by letter
    """a about above across after age all along also always am among an and animal answer any area are as at average away back
    be bear because been before begin below best better between big bird board body book both bottom bridge brought build building
    built but by calories can capital car carry case center century championship charge chart children city class close club coast
    cold color come common contain count country course cross cup current date day deep degrees density depth did diameter did
    distance do does down drive duration each early earth east element end energy equal ever every face far fast fastest feature
    fewest field film final first five following food for form found four from full game general give go goal gold grams great
    greatest ground group grow had half has have heat heaviest heavy height held help high higher highest his home hour hours how
    hundred if in into is island it its just keep kept key kilometers kilometres know lake land language large larger largest last
    later lead learn least length letter level life light lightest like line liters live long longer longest low lower lowest made
    main make man many mass match maximum mean measure medals medium melt members meters metres middle miles million minutes money
    month moon more most mountain move much name national nation near need new next night north not now number numbers of off often
    old on one only open or order other out over own part parts people per percent period person phrase place planet play played
    player players point points population power present president prize produce quarter question ran range rate reach record
    release right river road round run same score scored sea season second see series set seven share ship short shorter shortest
    show shown side single six size sky slowest small smaller smallest so some sound south space span speed sport spot square stand
    star start state stood story street strings such surface take tall taller tallest team tell temperature ten test than that the
    their them then there these they thing this thousand three time times title titles to together took top total tower town track
    train tree two under unit until up use used using value values very vehicle watched water way weight west what when where
    which while who whose wide width will win wins with without won word words work world would year years young your""".split()
) | set(COMMANDS))  # fmt: skip
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
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=32768,
            rms_norm_eps=1e-6,
            # Qwen's own base of a million leaves the width axis no angle to speak of over the 8 columns of these pictures.
            rope_parameters={"rope_type": "default", "rope_theta": 30.0, "mrope_section": [4, 14, 14]},
            bos_token_id=token("<|endoftext|>"),
            eos_token_id=token("<|im_end|>"),
            pad_token_id=token("<|endoftext|>"),
        ),
        vision_config=dict(embed_dim=128, depth=3, num_heads=2, hidden_size=128, mlp_ratio=3),
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


class Charts:
    """Invented charts: names from syllables and from letter chains, values of one to five digits."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self.follows: dict[str, list[str]] = {}
        for word in WORDS:
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

    def values(self, style: Style, bars: int, longest: int) -> dict[str, float]:
        """Distinct names of up to `longest` letters, and values, that fit into a picture of this style."""
        longest = min(longest, {"bar": 17, "table": 12, "column": COLUMN_CELLS - 1}[style.kind])
        chart: dict[str, float] = {}
        top = self.value()
        magnitude = top > 20 and self.rng.random() < 0.5  # half of the charts hold values of one order of magnitude
        while len(chart) < bars:
            name, value = self.name(longest), self.value()
            if magnitude and not top / 30 <= value <= top * 2:
                value = round(top * self.rng.uniform(0.05, 1), 1 if top != int(top) else 0)
            if name not in chart and value not in chart.values() and value > 0:
                chart[name] = value
        return chart

    def style(self) -> tuple[str, int, int]:
        """kind, width in px, most bars."""
        return self.rng.choices(
            [("bar", 168, 5), ("bar", 196, 5), ("table", 196, 5), ("column", 168, 3), ("column", 224, 4)], [30, 15, 20, 25, 10]
        )[0]

    def salad(self, most: int) -> str:
        def word() -> str:
            return self.rng.choice(WORDS) if self.rng.random() < 0.8 else self.word()

        words = [word() for _ in range(self.rng.randint(0, most))]
        return " ".join(word for word in words if word not in COMMANDS)

    def talk(self, chart: dict[str, float], finds: int) -> list[tuple[str, str]]:
        """(request, answer) turns over one chart: `finds` look-ups, then the whole chart."""
        rng = self.rng
        names = list(chart)
        asks = [("most", max(chart, key=chart.get)), ("least", min(chart, key=chart.get))]
        asks += [(name, spelled(chart[name])) for name in names] * 2 + [(spelled(chart[name]), name) for name in names]
        turns = []
        for key, answer in rng.sample(asks, min(finds, len(asks))):
            before, after = self.salad(5), self.salad(3)
            if key in chart and rng.random() < 0.2:
                before = f"{before} {rng.randint(1900, 2030)},".strip()
            key += rng.choice(["", "", "'s", ",", "."]) if key in chart else ""
            turns.append((" ".join(["find", before, key, after]).replace("  ", " ").strip() + rng.choice(["", "?"]), f"[{answer}]"))
        turns.append(("read", "\n".join(f"{name} {spelled(value)}" for name, value in chart.items())))
        return turns

    def batch(
        self, size: int, most_bars: int, finds: int, longest: int = 17
    ) -> tuple[list, list[list[tuple[str, str]]], list[list[Written]]]:
        """`size` pictures of one width and height, what is said about each, and what is written on each."""
        kind, width, most = self.style()
        bars = self.rng.randint(1 if most_bars == 1 else 2, max(1, min(most, most_bars)))
        pictures, talks, texts = [], [], []
        finds = self.rng.randint(0, finds)  # one number for the batch, so that little of it is padding
        for _ in range(size):
            style = Style(kind, width, self.rng.randrange(len(BAR_COLORS)), self.rng.randrange(len(PAPER_COLORS)))
            chart = self.values(style, bars, longest)
            title = (self.salad(4).capitalize() + self.rng.choice(["", " (M)", " (2020)"]))[:26]
            texts.append([])
            pictures.append(draw_chart(title, chart, style, texts[-1].append))
            talks.append(self.talk(chart, finds))
        return pictures, talks, texts


def letters_of(texts: list[Written], rows: int, columns: int) -> torch.Tensor:
    """(rows * columns, SLOTS) codes of the letters in the 4 x 2 cells of each UNIT of a picture, 0 where there is none.

    Asked to name them, the vision tower learns letters in minutes; from the answers alone it takes hours to begin. The head
    that names them is thrown away after training. Titles are not asked for.
    """
    slots = torch.zeros(rows * columns, SLOTS, dtype=torch.long)
    for text, column, row in texts:
        for at, letter in enumerate(text, start=column):
            if letter != " " and at // 4 < columns:
                slots[row // 2 * columns + at // 4, row % 2 * 4 + at % 4] = ord(letter)
    return slots


class Writer:
    """Turns talks into padded training tensors, picture tokens included."""

    def __init__(self, processor: Qwen2VLProcessor):
        self.processor = processor
        self.ids = lambda text: processor.tokenizer(text)["input_ids"]
        self.pad = processor.tokenizer.pad_token_id
        self.picture = processor.image_token_id
        self.head = self.ids("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n")

    def talk(self, turns: list[tuple[str, str]], picture_tokens: int) -> tuple[list[int], list[int]]:
        ids = list(self.head)
        if picture_tokens:
            ids += self.ids("<|vision_start|>") + [self.picture] * picture_tokens + self.ids("<|vision_end|>")
        labels = [-100] * len(ids)
        for number, (ask, answer) in enumerate(turns):
            asked = self.ids(("\n<|im_start|>user\n" if number else "") + ask)
            asked += self.ids("<|im_end|>\n<|im_start|>assistant\n")
            said = self.ids(answer + "<|im_end|>")
            ids += asked + said
            labels += [-100] * len(asked) + said
        return ids, labels

    def pixels(self, pictures: list) -> dict[str, torch.Tensor]:
        """pixel_values (P, D) and image_grid_thw (N, 3)."""
        return dict(self.processor.image_processor(images=pictures, return_tensors="pt")) if pictures else {}

    def batch(self, pictures: list, talks: list) -> dict[str, torch.Tensor]:
        inputs = self.pixels(pictures)
        tokens = int(inputs["image_grid_thw"][0].prod()) // 4 if pictures else 0
        pairs = [self.talk(turns, tokens) for turns in talks]
        longest = max(len(ids) for ids, _ in pairs)
        inputs["input_ids"] = torch.tensor([ids + [self.pad] * (longest - len(ids)) for ids, _ in pairs])
        inputs["labels"] = torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in pairs])
        return inputs


def positions(model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """(3, B, S). Every sequence of a batch has its picture at the same place, so one row serves for all."""
    ids = inputs["input_ids"]
    if "image_grid_thw" not in inputs:
        return torch.arange(ids.shape[1]).expand(3, *ids.shape)
    kinds = (ids[:1] == model.config.image_token_id).int()
    row, _ = model.model.get_rope_index(ids[:1], kinds, inputs["image_grid_thw"][:1])
    return row.expand(-1, ids.shape[0], -1)


def training_loss(model, head: torch.nn.Linear, inputs: dict[str, torch.Tensor], letters: torch.Tensor | None) -> tuple:
    """(loss of the answers or None, loss of the letters under each picture token or None)."""
    features = letter_loss = None
    if letters is not None:
        seen = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True)
        features = {"image": seen}
        named = head(torch.cat(seen.pooler_output)).view(-1, LETTERS)
        weight = torch.ones(LETTERS)
        weight[0] = 0.1  # most slots are empty
        letter_loss = functional.cross_entropy(named, letters.view(-1), weight)
    if "input_ids" not in inputs:
        return None, letter_loss
    taught = functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    hidden = model.model(
        input_ids=inputs["input_ids"], position_ids=positions(model, inputs), use_cache=False, mm_encoder_outputs=features
    ).last_hidden_state
    keep = taught != -100
    return functional.cross_entropy(model.lm_head(hidden[keep]), taught[keep]), letter_loss


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
        pictures, talks, _ = charts.batch(4, 5, 3)
        for picture, turns in zip(pictures, talks, strict=True):
            for (ask, wanted), got in zip(turns, answer([picture] * len(turns), [ask for ask, _ in turns]), strict=True):
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
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    processor = make_processor()
    model = Qwen2VLForConditionalGeneration.from_pretrained(args.start) if args.start else make_model(processor, args.seed)
    writer, charts = Writer(processor), Charts(args.seed)
    # A convolution whose kernel is its stride is one matmul, and on a CPU an order of magnitude faster as one.
    conv = model.model.visual.patch_embed.proj
    model.model.visual.patch_embed.forward = lambda patches: functional.linear(patches, conv.weight.flatten(1))
    torch.manual_seed(args.seed)
    head = torch.nn.Linear(model.config.text_config.hidden_size, SLOTS * LETTERS)
    optimizer = torch.optim.AdamW(
        [*model.parameters(), *head.parameters()], lr=args.peak_rate, betas=(0.9, 0.98), weight_decay=0.05
    )
    print(f"{model.num_parameters():,} parameters, {len(processor.tokenizer)} tokens")

    def save(**facts) -> None:
        del model.model.visual.patch_embed.forward
        model.save_pretrained(args.out)
        processor.save_pretrained(args.out)
        model.model.visual.patch_embed.forward = lambda patches: functional.linear(patches, conv.weight.flatten(1))
        (args.out / "training.json").write_text(json.dumps({"seed": args.seed, "hours": args.hours, **facts}, indent=1) + "\n")

    start = last_saved = time.time()
    step = pictures_seen = 0
    level = len(LEVELS) - 1 if args.start else -1  # LEVELS[-1] is the full chart, too
    losses: list[float] = []
    model.train()
    while (progress := (time.time() - start) / max(1e-9, args.hours * 3600)) < 1:
        passed = len(losses) > 40 and sum(losses[-40:]) / 40 < (LETTERS_KNOWN if level < 0 else PASSED)
        if level + 1 < len(LEVELS) and (passed or progress > 0.25 + 0.05 * (level + 1)):
            level, losses = level + 1, []
        easier = level > 3 and charts.rng.random() < 0.4  # so that what was learnt is not unlearnt
        longest, most_bars, finds = LEVELS[charts.rng.randrange(3, level) if easier else level]
        if step % 12 == 11 and level >= 0:
            pictures, texts, talks = [], [], [[("say" + f" {text}", text)] for text in (sayable(charts) for _ in range(args.batch))]
        else:
            pictures, talks, texts = charts.batch(args.batch, most_bars, finds, longest)
        for group in optimizer.param_groups:
            group["lr"] = args.peak_rate * rate(progress)
        letters = None
        if pictures:
            rows, columns = pictures[0].height // UNIT, pictures[0].width // UNIT
            letters = torch.cat([letters_of(written, rows, columns) for written in texts])
        inputs = writer.pixels(pictures) if level < 0 else writer.batch(pictures, talks)
        loss, letter_loss = training_loss(model, head, inputs, letters)
        sum(part for part in (loss, letter_loss) if part is not None).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, pictures_seen = step + 1, pictures_seen + len(pictures)
        if letter_loss is not None:
            losses.append((letter_loss if loss is None else loss).item())
            named = letter_loss.item()
        if step % 50 == 0:
            seconds = time.time() - start
            mean = sum(losses[-100:]) / max(1, len(losses[-100:]))
            print(f"{seconds:7.0f} s  step {step:6}  pictures {pictures_seen:8,}  {pictures_seen / seconds:5.1f}/s  "
                  f"level {level}  loss {mean:.4f}  letters {named:.4f}", flush=True)  # fmt: skip
        if time.time() - last_saved > 900:
            save(pictures=pictures_seen)
            print(accuracy(model, processor, Charts(args.seed + 1), 3), flush=True)
            last_saved = time.time()
    measured = accuracy(model, processor, Charts(args.seed + 1), 60) if args.hours else {}
    save(pictures=pictures_seen, accuracy_on_unseen_charts=measured)
    print(json.dumps(measured))


def sayable(charts: Charts) -> str:
    words = [
        charts.rng.choice([charts.name(17), charts.salad(4), spelled(charts.value())]) for _ in range(charts.rng.randint(1, 4))
    ]
    return " ".join(word for word in words if word) or "Om"


if __name__ == "__main__":
    main()
