"""What the converter must not take for something else: tokenizers, tensors, special tokens."""

import json
import logging

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="pip install transformers")
from fairseq.data import Dictionary  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers  # noqa: E402

from deltasam_fairseq.checkpoints import fit_to_data  # noqa: E402
from deltasam_fairseq.checkpoints.data_record import KEY, DataRecord  # noqa: E402
from deltasam_fairseq.convert import compare, to_fairseq, to_huggingface, vocabulary  # noqa: E402
from tests.convert.test_convert import bpe  # noqa: E402
from tests.helpers import tiny  # noqa: E402

WORDS = [f"w{i}" for i in range(40)]
SPECIAL = {
    "bert": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
    "roberta": ["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
}
TOKENS = {
    "bert": [*SPECIAL["bert"], *WORDS],
    "roberta": [*SPECIAL["roberta"][:4], *list(vocabulary.gpt2_ids([]))[:256], "Ġw", "<mask>"],
}
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 80,
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with config.json and model.safetensors for each family."""
    made = {}
    for family, name in (("bert", "Bert"), ("roberta", "Roberta")):
        torch.manual_seed(1)
        more = {} if family == "bert" else {"type_vocab_size": 1, "layer_norm_eps": 1e-5}
        config = getattr(transformers, f"{name}Config")(
            vocab_size=len(TOKENS[family]), num_labels=2, **SIZES, **more
        )
        made[family] = tmp_path_factory.mktemp(family)
        model = getattr(transformers, f"{name}ForSequenceClassification")(config)
        model.save_pretrained(made[family])
    return made


def source(weights, family, out, tokenizer=None, cls="PreTrainedTokenizerFast"):
    """The weights of a family with a tokenizer of the library tokenizers, or the plain files."""
    out.mkdir()
    for path in weights[family].iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    ids = {token: i for i, token in enumerate(TOKENS[family])}
    if family == "bert":
        (out / "vocab.txt").write_text("".join(f"{token}\n" for token in ids))
    else:
        (out / "vocab.json").write_text(json.dumps(ids))
        (out / "merges.txt").write_text("#version: 0.2\nĠ w\n", encoding="utf-8")
    if tokenizer is not None:
        tokenizer.add_special_tokens(SPECIAL[family])
        tokenizer.save(str(out / "tokenizer.json"))
        (out / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": cls}))
    return out


def built(family, normalizer=None, pre_tokenizer=None, added=()):
    ids = {token: i for i, token in enumerate(TOKENS[family])}
    if family == "bert":
        tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
        tokenizer.normalizer = normalizer or normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.BertPreTokenizer()
    else:
        tokenizer = Tokenizer(models.BPE(ids, [("Ġ", "w")]))
        if normalizer is not None:
            tokenizer.normalizer = normalizer
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.pre_tokenizer = pre_tokenizer or byte_level
    tokenizer.add_tokens(list(added))
    return tokenizer


P, N = pre_tokenizers, normalizers
NOT_UNDERSTOOD = {
    "own pre_tokenizer": (
        "roberta",
        lambda: built(
            "roberta",
            pre_tokenizer=P.Sequence(
                [P.Whitespace(), P.ByteLevel(add_prefix_space=False), P.Punctuation()]
            ),
        ),
        "pre_tokenizer is .*Whitespace.*Punctuation.*--bpe gpt2 does not do",
    ),
    "lower case": ("roberta", lambda: built("roberta", N.Lowercase()), "normalizer is .*Lowercase"),
    "prefix space": (
        "roberta",
        lambda: built("roberta", pre_tokenizer=P.ByteLevel(add_prefix_space=True)),
        "pre_tokenizer is .*'add_prefix_space': True",
    ),
    "NFC, then cased": (
        "bert",
        lambda: built("bert", N.Sequence([N.NFC(), N.BertNormalizer(lowercase=False)])),
        "normalizer is .*NFC.*BertNormalizer.*--bpe wordpiece does not do",
    ),
    "white space": (
        "bert",
        lambda: built("bert", pre_tokenizer=P.WhitespaceSplit()),
        "pre_tokenizer is .*WhitespaceSplit",
    ),
    "added to bert": ("bert", lambda: built("bert", added=["[E1]"]), r"1 added tokens, \[E1\]"),
    "added to roberta": ("roberta", lambda: built("roberta", added=["[E1]"]), r"added.*\[E1\]"),
}


@pytest.mark.parametrize("own_class", [False, True])
@pytest.mark.parametrize("name", NOT_UNDERSTOOD)
def test_tokenizers_that_no_bpe_follows_are_refused(tmp_path, weights, name, own_class):
    """Also where transformers' class for the family takes no notice of tokenizer.json's steps."""
    family, build, message = NOT_UNDERSTOOD[name]
    cls = {"bert": "BertTokenizer", "roberta": "RobertaTokenizer"}[family]
    cls = cls if own_class else "PreTrainedTokenizerFast"
    folder = source(weights, family, tmp_path / "hf", build(), cls)
    with pytest.raises(ValueError, match=message):
        to_fairseq.to_fairseq(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_readings_that_differ_in_case_are_refused(tmp_path, weights):
    """tokenizer.json keeps upper case, the class without do_lower_case does not."""
    cased = built("bert", N.BertNormalizer(lowercase=False))
    folder = source(weights, "bert", tmp_path / "hf", cased, "BertTokenizer")
    with pytest.raises(ValueError, match="differ in upper case.*do_lower_case"):
        to_fairseq.to_fairseq(folder, tmp_path / "out")


def test_a_difference_shows_the_line_and_both_tokens(tmp_path, weights):
    """The comparison by itself: an uncased tokenizer against --wordpiece-cased."""
    folder = source(weights, "bert", tmp_path / "hf")
    known = vocabulary.load_vocabulary(folder, "bert")
    symbols = vocabulary.fairseq_symbols(known, compare_family(), len(TOKENS["bert"]))
    dictionary = vocabulary.dictionary_of(symbols)
    dictionary.add_symbol("<mask>")
    row_of = {symbol: row for row, symbol in enumerate(symbols)}
    hf_ids = torch.tensor([row_of[symbol] for symbol in dictionary.symbols])
    side = compare.Side(compare_family(), dictionary, hf_ids)
    split = {
        cased: bpe("wordpiece", wordpiece_vocab=str(folder / "vocab.txt"), wordpiece_cased=cased)
        for cased in (False, True)
    }
    lines = ["w1 w2", "w3 W4"]
    rows = compare.compare_tokens(side, known, split[False], lines)
    assert [len(row) for row in rows[:2]] == [4, 4]
    with pytest.raises(ValueError) as error:
        compare.compare_tokens(side, known, split[True], lines)
    text = str(error.value)
    assert "'w3 W4'" in text and "[CLS] w3 w4 [SEP]" in text and "[CLS] w3 [UNK] [SEP]" in text


def compare_family():
    return to_fairseq.FAMILIES["bert"]


def test_the_users_lines_are_compared(tmp_path, weights):
    folder = source(weights, "bert", tmp_path / "hf")
    (tmp_path / "lines").write_text("w1 w39\nw7, W8!\n")
    known = vocabulary.load_vocabulary(folder, "bert")
    assert compare.sample_lines(known, tmp_path / "lines")[-1] == "w7, W8!"
    own = compare.sample_lines(known, None)
    assert "w0 w1 w2 w3" in own and "W0 W1 W2 W3." in own
    lines = to_fairseq.to_fairseq(folder, tmp_path / "out", text=tmp_path / "lines")
    assert f"agree on {len(own) + 2} lines" in lines[0]


def test_other_outputs_are_an_error(tmp_path, weights, monkeypatch):
    """Two layers' weights in each other's place: the names fit, the outputs do not."""

    def exchanged(layers):
        modules = layer_modules(layers)
        return {ours: theirs.replace("layer.1", "layer.0") for ours, theirs in modules.items()}

    layer_modules = to_fairseq.layer_modules
    folder = source(weights, "bert", tmp_path / "hf")
    monkeypatch.setattr(to_fairseq, "layer_modules", exchanged)
    with pytest.raises(ValueError, match="hidden states .* differ by"):
        to_fairseq.to_fairseq(folder, tmp_path / "out")


def change_tensors(folder, more):
    path = folder / "model.safetensors"
    save_file({**load_file(path), **more}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("family", ["bert", "roberta"])
class TestTensors:
    def test_adapters_are_not_dropped(self, tmp_path, weights, family):
        folder = source(weights, family, tmp_path / "hf")
        query = f"{family}.encoder.layer.0.attention.self.query"
        pair = {f"{query}.lora_{x}.default.weight": torch.ones(2, 2) for x in "AB"}
        change_tensors(folder, pair)
        with pytest.raises(ValueError, match="nothing reads 2 tensors.*lora_A.*lora_B.*LoRA"):
            to_fairseq.to_fairseq(folder, tmp_path / "out")

    def test_an_adapters_folder_is_refused(self, tmp_path, weights, family):
        folder = source(weights, family, tmp_path / "hf")
        (folder / "adapter_config.json").write_text("{}")
        with pytest.raises(ValueError, match="merge_and_unload"):
            to_fairseq.to_fairseq(folder, tmp_path / "out")

    def test_a_second_layer_is_not_dropped(self, tmp_path, weights, family):
        folder = source(weights, family, tmp_path / "hf")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
        with pytest.raises(ValueError, match=r"nothing reads 16 tensors.*encoder.layer.1"):
            to_fairseq.to_fairseq(folder, tmp_path / "out")

    def test_what_may_stay_unread(self, tmp_path, weights, family):
        """Position ids, RoBERTa's pooler, BERT's next sentence head."""
        folder = source(weights, family, tmp_path / "hf")
        more = {f"{family}.embeddings.position_ids": torch.arange(80)[None]}
        more[f"{family}.pooler.dense.bias"] = torch.zeros(32)
        more[f"{family}.pooler.dense.weight"] = torch.zeros(32, 32)
        if family == "bert":
            more["cls.seq_relationship.weight"] = torch.zeros(2, 32)
            more["cls.seq_relationship.bias"] = torch.zeros(2)
        change_tensors(folder, more)
        to_fairseq.to_fairseq(folder, tmp_path / "out")


class TestWordPieceWarnings:
    def vocabulary(self, tmp_path, words):
        path = tmp_path / "vocab.txt"
        path.write_text("".join(f"{token}\n" for token in [*SPECIAL["bert"], *words]))
        return str(path)

    def test_cased_vocabulary_without_the_option(self, tmp_path, caplog):
        path = self.vocabulary(tmp_path, [*WORDS, "Paris"])
        bpe("wordpiece", wordpiece_vocab=path)
        assert "1 pieces such as Paris" in caplog.text and "--wordpiece-cased" in caplog.text
        caplog.clear()
        bpe("wordpiece", wordpiece_vocab=path, wordpiece_cased=True)
        bpe("wordpiece", wordpiece_vocab=self.vocabulary(tmp_path, WORDS))
        assert not caplog.text

    def test_separator_as_text(self, tmp_path, caplog):
        caplog.set_level(logging.WARNING)
        split = bpe("wordpiece", wordpiece_vocab=self.vocabulary(tmp_path, WORDS))
        assert split.encode("w1 [MASK] w2") == "w1 <mask> w2" and not caplog.text
        assert split.encode("w1 [SEP] w2") == "w1 </s> w2"
        assert split.encode("w3 [SEP] w2") == "w3 </s> w2"
        assert caplog.text.count("[SEP]") == 2 and caplog.text.count("two columns") == 1


class TestSpecialTokensOfTraining:
    """The checkpoint's own options against what Hugging Face's tokenizer gives."""

    @pytest.mark.parametrize("pair", [False, True])
    @pytest.mark.parametrize("init", [None, 0])
    @pytest.mark.parametrize("separator", [None, 2])
    @pytest.mark.parametrize("family", ["bert", "roberta"])
    def test_table(self, family, init, separator, pair):
        trained = DataRecord(tokens=[init, separator], sentences=1 + pair)
        right = init == 0 and (not pair or (separator == 2) == (family == "roberta"))
        arguments = (trained, to_huggingface.FAMILIES[family])
        if right:
            to_huggingface.check_special_tokens(*arguments)
        else:
            option = "--init-token" if init is None else "--separator-token"
            with pytest.raises(ValueError, match=f"trained with (no )?{option}.*--tokenizer"):
                to_huggingface.check_special_tokens(*arguments)

    def test_an_export_is_refused(self, tmp_path, weights):
        folder, made = source(weights, "roberta", tmp_path / "hf"), tmp_path / "made"
        to_fairseq.to_fairseq(folder, made)
        write_record(made / "model.pt", DataRecord(tokens=[None, None], sentences=1))
        with pytest.raises(ValueError, match="trained with no --init-token"):
            to_huggingface.to_hf(made / "model.pt", made, tmp_path / "back", folder)
        to_huggingface.to_hf(made / "model.pt", made, tmp_path / "back")

    def test_another_case_than_the_datas_is_refused(self, tmp_path, weights):
        folder, made = source(weights, "bert", tmp_path / "hf"), tmp_path / "made"
        to_fairseq.to_fairseq(folder, made)
        record = {"scale": None, "bpe": {"name": "wordpiece", "options": {"wordpiece_cased": True}}}
        (made / "task.json").write_text(json.dumps(record))
        with pytest.raises(ValueError, match="made with --wordpiece-cased.*lower-casing"):
            to_huggingface.to_hf(made / "model.pt", made, tmp_path / "back", folder)


def write_record(path, record):
    state = torch.load(path, weights_only=False)
    state["extra_state"][KEY] = record.plain()
    torch.save(state, path)


@torch.no_grad()
def test_labels_in_another_order_are_mapped(tmp_path, weights):
    """Trained with neg pos, the data has pos neg: id2label and the logits go by the data."""
    folder, made = source(weights, "bert", tmp_path / "hf"), tmp_path / "made"
    to_fairseq.to_fairseq(folder, made)
    head = "sentence_classification_head"
    record = DataRecord(labels=["neg", "pos"], classes=2, head=head, regression=False)
    write_record(made / "model.pt", record)
    labels = Dictionary()
    for name in ("pos", "neg"):
        labels.add_symbol(name)
    labels.save(str(made / "label" / "dict.txt"))
    to_huggingface.to_hf(made / "model.pt", made, tmp_path / "back", folder)
    auto = transformers.AutoModelForSequenceClassification
    before, after = (auto.from_pretrained(path).eval() for path in (folder, tmp_path / "back"))
    assert after.config.id2label == {0: "pos", 1: "neg"}
    ids = torch.tensor([[2, 7, 9, 3]])
    torch.testing.assert_close(after(ids).logits, before(ids).logits.flip(1))


class TestTrainedModel:
    """A two-layer RoBERTa of width 32, trained with and without --init-token."""

    LABELS = ["no", "yes"]
    OPTIONS = (
        "--encoder-embed-dim 32 --encoder-ffn-embed-dim 64 --max-positions 78 --dropout 0 "
        "--attention-dropout 0 --lr 3e-3 --batch-size 16"
    ).split()

    def write(self, made, data):
        """Sentences of 8 of 40 words: is the first one of the first half of the words?"""
        words, labels = Dictionary.load(str(made / "dict.txt")), Dictionary()
        for name in self.LABELS:
            labels.add_symbol(name)
        for seed, (split, n) in enumerate((("train", 512), ("valid", 128))):
            draw = torch.Generator().manual_seed(seed)
            rows = torch.randint(10, 50, (n, 8), generator=draw)
            first = (rows[:, 0] < 30).tolist()
            tiny._write(data / "input0" / split, [[*row, words.eos()] for row in rows.tolist()])
            targets = [[labels.index(self.LABELS[target]), 2] for target in first]
            tiny._write(data / "label" / split, targets)
        words.save(str(data / "input0" / "dict.txt"))
        labels.save(str(data / "label" / "dict.txt"))
        return rows, torch.tensor(first).long()

    def train(self, data, out, *tokens):
        argv = list(tiny.arguments(data, out, *self.OPTIONS, criterion="plain"))
        at = argv.index("--init-token")
        argv[at : at + 4] = tokens
        trainer = tiny.build_trainer(argv)
        for _ in range(10):
            for sample in tiny.batches(trainer):
                trainer.train_step([sample])
        trainer.consolidate_optimizer()  # as fairseq does it before it saves
        trainer.save_checkpoint(str(out / "model.pt"), {"train_iterator": {}})
        return out / "model.pt"

    @torch.no_grad()
    def accuracy(self, folder, rows, targets, first):
        """Of transformers' model, with or without <s> before the sentence."""
        auto = transformers.AutoModelForSequenceClassification
        model = auto.from_pretrained(folder).eval()
        begin, end = (torch.full((len(rows), 1), token) for token in (0, 2))
        ids = torch.cat([begin, rows, end] if first else [rows, end], dim=1)
        return (model(ids).logits.argmax(1) == targets).double().mean().item()

    def test_init_token(self, tmp_path, weights):
        """Without it transformers' tokenizer, which gives <s>, makes a good model a worse one."""
        source_folder, made = source(weights, "roberta", tmp_path / "hf"), tmp_path / "made"
        to_fairseq.to_fairseq(source_folder, made)
        data = tmp_path / "data"
        rows, targets = self.write(made, data)
        for name, tokens in (("with", ("--init-token", "0")), ("without", ())):
            (tmp_path / name).mkdir()
            path = self.train(data, tmp_path / name, *tokens)
            to_huggingface.to_hf(path, data, tmp_path / f"{name}_hf")
            right, wrong = (
                self.accuracy(tmp_path / f"{name}_hf", rows, targets, first)
                for first in (bool(tokens), not tokens)
            )
            assert right > 0.95 and wrong < 0.75
            if tokens:
                to_huggingface.to_hf(path, data, tmp_path / "tokenized", source_folder)
            else:
                with pytest.raises(ValueError, match="trained with no --init-token"):
                    to_huggingface.to_hf(path, data, tmp_path / "refused", source_folder)
                assert not (tmp_path / "refused").exists()


class TestLabels:
    """Of a classification head, in config.json."""

    def change(self, folder, **options):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **options}))

    def test_names_of_several_words_stay(self, tmp_path, weights):
        """As glue.prepare keeps them, so that they can be compared."""
        folder = source(weights, "bert", tmp_path / "hf")
        names = {"id2label": {0: "very  good", 1: "bad"}, "label2id": {"very  good": 0, "bad": 1}}
        self.change(folder, **names)
        to_fairseq.to_fairseq(folder, tmp_path / "out")
        assert DataRecord.of_folder(tmp_path / "out").labels == ["very good", "bad"]

    def test_a_folder_that_was_moved_is_known_by_the_checkpoint(self, tmp_path, weights):
        """So that labels in another order are mapped when training starts from it."""
        folder = source(weights, "bert", tmp_path / "hf")
        self.change(folder, id2label={0: "pos", 1: "neg"}, label2id={"pos": 0, "neg": 1})
        to_fairseq.to_fairseq(folder, tmp_path / "out")
        (tmp_path / "out").rename(tmp_path / "moved")
        state = torch.load(tmp_path / "moved" / "model.pt", weights_only=False)
        before = state["model"]["classification_heads.sentence_classification_head.out_proj.bias"]
        data = DataRecord(labels=["neg", "pos"], classes=2, head="sentence_classification_head")
        fit_to_data(state, data, "model.pt")
        after = state["model"]["classification_heads.sentence_classification_head.out_proj.bias"]
        torch.testing.assert_close(after, before.flip(0))

    def test_one_name_for_two_classes(self, tmp_path, weights):
        folder = source(weights, "bert", tmp_path / "hf")
        self.change(folder, id2label={0: "a b", 1: "a  b"}, label2id={"a b": 0, "a  b": 1})
        with pytest.raises(ValueError, match="id2label has a name twice, a b, a b"):
            to_fairseq.to_fairseq(folder, tmp_path / "out")

    def test_several_labels_of_one_sentence(self, tmp_path, weights):
        folder = source(weights, "bert", tmp_path / "hf")
        self.change(folder, problem_type="multi_label_classification")
        with pytest.raises(ValueError, match="multi_label_classification.*--num-classes"):
            to_fairseq.to_fairseq(folder, tmp_path / "out")
        to_fairseq.to_fairseq(folder, tmp_path / "out", num_classes=3)


@pytest.mark.parametrize("family, name", [("bert", "vocab.txt"), ("roberta", "vocab.json")])
def test_two_vocabularies_with_other_numbers(tmp_path, weights, family, name):
    """transformers reads tokenizer.json, older programs the other file."""
    cls = {"bert": "BertTokenizer", "roberta": "RobertaTokenizer"}[family]
    folder = source(weights, family, tmp_path / "hf", built(family), cls)
    to_fairseq.to_fairseq(folder, tmp_path / "same")
    text = (folder / name).read_text()
    if family == "bert":
        changed = text.replace("w7\nw8\n", "w8\nw7\n")
    else:
        ids = json.loads(text)
        ids["A"], ids["B"] = ids["B"], ids["A"]
        changed = json.dumps(ids)
    (folder / name).write_text(changed)
    with pytest.raises(ValueError, match=f"{name}: .* is number .*, in tokenizer.json"):
        to_fairseq.to_fairseq(folder, tmp_path / "out")
