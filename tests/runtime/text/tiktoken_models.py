"""A small `tiktoken.model` as Kimi and Moonlight have it, trained here, and what the models' own code makes of it."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import tiktoken
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

RANKS = 3840  # and 256 special tokens: the 4096 of examples/tiny-deepseek-v3-fp8

# `pat_str` of tokenization_kimi.py (Kimi-K2-Instruct) and tokenization_moonshot.py (Moonlight-16B-A3B).
PATTERN = (
    r"[\p{Han}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)

# Article 1 of the Universal Declaration of Human Rights, or its beginning, in 24 scripts.
SCRIPTS = {
    "Latin": "All human beings are born free and equal in dignity and rights. Tất cả mọi người sinh ra đều được tự do.",
    "Greek": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.",
    "Cyrillic": "Все люди рождаются свободными и равными в своем достоинстве и правах. Їжак єднає ґанок.",
    "Armenian": "Բոլոր մարդիկ ծնվում են ազատ ու հավասար՝ իրենց արժանապատվությամբ և իրավունքներով։",
    "Georgian": "ყველა ადამიანი იბადება თავისუფალი და თანასწორი თავისი ღირსებითა და უფლებებით. ᲥᲐᲠᲗᲣᲚᲘ",
    "Hebrew": "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם. שָׁלוֹם",
    "Arabic": "يولد جميع الناس أحرارا متساوين في الكرامة والحقوق. ١٢٣٤٥٦ مَرْحَبًا",
    "Syriac": "ܟܠ ܒܪܢܫܐ ܒܪܝܠܗ ܚܐܪܐ ܘܒܪܒܪ ܓܘ ܐܝܩܪܐ ܘܙܕܩܐ",
    "Devanagari": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है। १२३४५",
    "Bengali": "সমস্ত মানুষ স্বাধীনভাবে সমান মর্যাদা এবং অধিকার নিয়ে জন্মগ্রহণ করে।",
    "Gurmukhi": "ਸਾਰਾ ਮਨੁੱਖੀ ਪਰਿਵਾਰ ਆਪਣੀ ਮਹਿਮਾ, ਸ਼ਾਨ ਅਤੇ ਹੱਕਾਂ ਦੇ ਪੱਖੋਂ ਜਨਮ ਤੋਂ ਹੀ ਆਜ਼ਾਦ ਹੈ।",
    "Gujarati": "પ્રતિષ્ઠા અને અધિકારોની દૃષ્ટિએ સર્વ માનવો જન્મથી સ્વતંત્ર અને સમાન હોય છે.",
    "Tamil": "மனிதப் பிறவியினர் சகலரும் சுதந்திரமாகவே பிறக்கின்றனர்.",
    "Telugu": "ప్రతిపత్తిస్వత్వముల విషయమున మానవులెల్లరును జన్మతః స్వతంత్రులును సమానులును నగుదురు.",
    "Kannada": "ಎಲ್ಲಾ ಮಾನವರೂ ಸ್ವತಂತ್ರರಾಗಿಯೇ ಜನಿಸಿದ್ದಾರೆ.",
    "Malayalam": "മനുഷ്യരെല്ലാവരും തുല്യാവകാശങ്ങളോടും അന്തസ്സോടും സ്വാതന്ത്ര്യത്തോടുംകൂടി ജനിച്ചവരാണ്‌.",
    "Sinhala": "සියලු මනුෂ්‍යයෝ නිදහස්ව උපත ලබා ඇත.",
    "Thai": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ ๑๒๓๔",
    "Lao": "ມະນຸດທຸກຄົນເກີດມາມີກຽດສັກສີ, ສິດທິ, ເສລີພາບແລະຄວາມສະເໝີພາບເທົ່າທຽມກັນ.",
    "Tibetan": "འགྲོ་བ་མིའི་རིགས་རྒྱུད་ཡོངས་ལ་སྐྱེས་ཙམ་ཉིད་ནས་ཆེ་མཐོངས་དང༌། ཐོབ་ཐངགི་རང་དབང་འདྲ་མཉམ་དུ་ཡོད།",
    "Myanmar": "လူတိုင်းသည် တူညီ လွတ်လပ်သော ဂုဏ်သိက္ခာဖြင့် လည်းကောင်း၊ မွေးဖွားလာသူများ ဖြစ်သည်။",
    "Khmer": "មនុស្សទាំងអស់ កើតមកមានសេរីភាព និងសមភាព ក្នុងផ្នែកសេចក្ដីថ្លៃថ្នូរនិងសិទ្ធិ។",
    "Ethiopic": "የሰው፡ልጅ፡ሁሉ፡ሲወለድ፡ነጻና፡በክብርና፡በመብትም፡እኩልነት፡ያለው፡ነው።",
    "Hangul": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. 각",
    "Kana": "すべての人間は、生れながらにして自由であり、かつ、尊厳と権利とについて平等である。カタカナ ｶﾀｶﾅ 々〆〇",
    "Han": "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。𠮷野家",
    "Cherokee": "ᏂᎦᏓ ᎠᏂᏴᏫ ᏂᎨᎫᏓᎸᎾ ᎠᎴ ᎤᏂᏠᏱ ᎤᎾᏕᎿ ᏚᏳᎧᏛ",
    "Mongolian": "ᠬᠦᠮᠦᠨ ᠪᠦᠷ ᠲᠥᠷᠥᠵᠦ ᠮᠡᠨᠳᠡᠯᠡᠬᠦ ᠡᠷᠬᠡ ᠴᠢᠯᠥᠭᠡ ᠲᠡᠶ",
}
CODE = (
    "def f(x: int, *, n=10_000) -> str:\n\tif x != 0x1F:\n        return f'{x!r:>10}'  # it's, WE'LL, don'T\r\n\r\n"
    '    int main(void) { return a->b[++i] && !c || d >>= 2; }\n\n\n<p class="x">&nbsp;</p>\nSELECT * FROM t WHERE '
    "a<>'b';\nhttps://example.com/a/b?c=d&e=%20#f C:\\dir\\x.txt camelCase HTTPServer snake_case __init__ $$x^2+y_1$$"
)
ODD = {
    "emoji": "👩‍👩‍👧‍👦👍🏽🏴󠁧󠁢󠁳󠁣󠁴󠁿🇨🇳❤️‍🔥☺️1️⃣ ok🙂text🚀",
    "digits": "0 12 123 1234 1234567890123456789012345678901234567890 3.14159 1,000,000 ²³½Ⅷ①٣",
    "spaces": "a  b   c\t\td\u00a0\u3000e \n \n\n  f\r\n\r\ng \t\n\x0b\x0c\x85\u2028\u2029 h" + " " * 300 + "i   ",
    "contractions": "it's IT'S we'Re They'LL I'm I'M he'd You've 'tis rock'n'roll it’s o'clock's 'ſ",
    "control": "".join(map(chr, range(32))) + "\x7f\x80\x9f\u200b\u200d\ufeff\ufffd\ufffe\U0010ffff",
    "marks": "e\u0301a\u0308 \u0301x Z̷͑a̶l̸g̵o ǅ ǈabc ʰʲx ﬁ ß ẞ İi ı",
    "mixed": "中文English混合abc中 中's 文a1文 A中B ⼀⼁ 々中〇 日本語のテキスト한국어中",
    "empty": "",
}

# Ids after the ranks, as in Kimi-K2's tokenizer_config.json: name → (offset, special).
NAMED = {
    "[BOS]": (0, True),
    "[EOS]": (1, True),
    "<|im_end|>": (2, True),
    "<|im_user|>": (3, True),
    "<|im_assistant|>": (4, True),
    "<|start_header_id|>": (6, True),
    "<|end_header_id|>": (7, True),
    "[EOT]": (9, True),
    "<|im_system|>": (10, True),
    "<|tool_calls_section_begin|>": (11, False),
    "<|tool_calls_section_end|>": (12, False),
    "<|im_middle|>": (17, True),
    "<think>": (22, False),
    "</think>": (23, False),
    "[UNK]": (254, True),
    "[PAD]": (255, True),
}
TEMPLATE = (
    "{%- for message in messages -%}{%- if loop.first and messages[0]['role'] != 'system' -%}"
    "<|im_system|>system<|im_middle|>You are a helpful assistant<|im_end|>{%- endif -%}"
    "<|im_{{ message['role'] }}|>{{ message['role'] }}<|im_middle|>{{ message['content'] }}<|im_end|>{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}"
)


def texts() -> list[str]:
    return [*SCRIPTS.values(), CODE, *ODD.values()]


def documents() -> list[str]:
    """The project's own."""
    paths = sorted((Path(__file__).resolve().parents[3] / "docs").glob("*.md"))
    return [path.read_text(encoding="utf-8") for path in paths]


def train_ranks() -> dict[bytes, int]:
    """Byte strings by rank: the 256 bytes, then merges of the texts of this file and of the project's documents."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.Split(Regex(PATTERN), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    corpus = [*texts() * 20, *documents()]
    trainer = trainers.BpeTrainer(vocab_size=RANKS, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    byte_of = {character: byte for byte, character in _gpt2_characters().items()}
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    assert len(vocabulary) == RANKS
    return {bytes(byte_of[character] for character in text): rank for text, rank in vocabulary}


def _gpt2_characters() -> dict[int, str]:
    """Character of each byte in a byte-level vocabulary: itself where it is visible, else the next one from U+0100."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + place) for place, byte in enumerate(hidden)}


def write_ranks(directory: Path, ranks: dict[bytes, int]) -> Path:
    lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
    path = directory / "tiktoken.model"
    path.write_bytes(b"".join(lines))
    return path


def config_of(first: int) -> dict[str, Any]:
    """Content of tokenizer_config.json after `first` ranks."""
    return {
        "added_tokens_decoder": {
            str(first + offset): {
                "content": text,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": special,
            }
            for text, (offset, special) in NAMED.items()
        },
        "additional_special_tokens": [text for text, (_, special) in NAMED.items() if special][2:-2],
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
        "bos_token": "[BOS]",
        "clean_up_tokenization_spaces": False,
        "eos_token": "[EOS]",
        "extra_special_tokens": {},
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": "[PAD]",
        "tokenizer_class": "TikTokenTokenizer",
        "unk_token": "[UNK]",
        "chat_template": TEMPLATE,
    }


def write_files(directory: Path, ranks: dict[bytes, int]) -> Path:
    """Write what Kimi-K2 has beside its weights, code that must not run among it."""
    write_ranks(directory, ranks)
    (directory / "tokenizer_config.json").write_text(json.dumps(config_of(len(ranks))))
    (directory / "tokenization_kimi.py").write_text("raise SystemExit('remote code')\n")
    return directory


def kimi_checkpoint(example: Path, directory: Path, ranks: dict[bytes, int]) -> Path:
    """A copy of an example checkpoint with these files in place of its tokenizer."""
    shutil.copytree(example, directory)
    for path in directory.glob("tokenizer*"):
        path.unlink()
    return write_files(directory, ranks)


def reference(directory: Path) -> tiktoken.Encoding:
    """The encoding that tokenization_kimi.py builds of a directory's files."""
    # Not by load_tiktoken_bpe, which keeps what it once read from a path.
    lines = (line.split() for line in (directory / "tiktoken.model").read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    config = json.loads((directory / "tokenizer_config.json").read_text())
    names = {int(number): token["content"] for number, token in config["added_tokens_decoder"].items()}
    special = {
        names.get(number, f"<|reserved_token_{number}|>"): number for number in range(len(ranks), len(ranks) + 256)
    }
    return tiktoken.Encoding("kimi", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
