"""Tokenizers of every family, small, made from given vocabularies: the library's trainers differ from run to run."""

from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

MERGES = ["t h", "th e", "i n", "e r", "Ġ t", "Ġ a", "B e", "Be r", ". .", "1 2"]


def tokenizer_json(family: str) -> str:
    """tokenizer.json of one of FAMILIES."""
    tokenizer: Tokenizer = FAMILIES[family]()
    return str(tokenizer.to_str())


def _wordpiece() -> Tokenizer:
    """BERT's: lower case, words cut into pieces, ## before all but a word's first."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{c}" for c in letters), "the", "time", "ber", "##lin"]
    tokenizer = Tokenizer(models.WordPiece({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def _bytes(pre_tokenizer: Any, *, special: bool = True) -> Tokenizer:
    vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2}
    for token in (*sorted(pre_tokenizers.ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)):
        vocabulary.setdefault(token, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(merge.split()) for merge in MERGES]))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    if special:
        tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return tokenizer


def _split_bytes() -> Tokenizer:
    """Llama's since the third, Qwen's: a pattern cuts the text, and only then it becomes bytes."""
    pattern = Regex(r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+")
    cut = pre_tokenizers.Split(pattern, "isolated")
    rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _bytes(pre_tokenizers.Sequence([cut, rest]), special=False)


def _pieces(scheme: str) -> Tokenizer:
    """SentencePiece's, as T5, XLM-R and Llama have it: ▁ is where a space was."""
    letters = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:()"
    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *((letter, -6.0) for letter in letters)]
    scores += [("▁the", -3.0), ("▁time", -3.0), ("▁Ber", -3.5), ("lin", -3.5), (").", -3.0)]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def _prepended() -> Tokenizer:
    """Llama's first: ▁ is set by a normalizer, and nothing cuts the text."""
    letters = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:()"
    vocabulary = {letter: number for number, letter in enumerate(("<unk>", "<s>", "</s>", *letters, "▁t", "▁th"))}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "t"), ("▁t", "h")], unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


FAMILIES: dict[str, Any] = {
    "wordpiece": _wordpiece,
    "bytes": lambda: _bytes(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "bytes with a space before": lambda: _bytes(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "cut, then bytes": _split_bytes,
    "pieces": lambda: _pieces("always"),
    "pieces, the first with a space": lambda: _pieces("first"),
    "prepended": _prepended,
}
