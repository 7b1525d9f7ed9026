"""Checkpoints load, hostile ones do not run, and one that is missing is an error."""

import argparse
import collections
import contextlib
import io
import os
import pickle
import random
import sys
import threading
import types

import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import meters
from fairseq.models.roberta import RobertaModel
from omegaconf import DictConfig, OmegaConf

from deltasam_fairseq import checkpoints

MODES = ["torch", "restricted"]


@pytest.fixture(autouse=True)
def _installed():
    checkpoints.install()


@pytest.fixture(params=MODES)
def mode(request, monkeypatch):
    """Both readers, torch's own and the one for torch < 2.6."""
    if request.param == "torch" and not checkpoints._HAS_SAFE_GLOBALS:
        pytest.skip("torch < 2.6")
    monkeypatch.setattr(checkpoints, "_HAS_SAFE_GLOBALS", request.param == "torch")
    return request.param


@contextlib.contextmanager
def argv(*args):
    before, sys.argv = sys.argv, ["fairseq", *map(str, args)]
    try:
        yield
    finally:
        sys.argv = before


TRAIN = (
    "--task sentence_prediction --num-classes 2 --arch roberta --encoder-layers 1 --encoder-embed-dim 8 "
    "--encoder-ffn-embed-dim 8 --encoder-attention-heads 2 --max-positions 32 --init-token 0 "
    "--separator-token 2 --criterion sentence_prediction --optimizer adam --lr 1e-3 --batch-size 4 "
    "--best-checkpoint-metric accuracy --maximize-best-checkpoint-metric --num-workers 0 --cpu "
    "--lr-scheduler polynomial_decay --total-num-update 8 --no-progress-bar"
).split()


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A classification data set and a checkpoint that fairseq-train made of it."""
    from fairseq_cli import preprocess, train

    checkpoints.install()
    root = tmp_path_factory.mktemp("trained")
    rng = random.Random(0)
    for split in ("train", "valid"):
        lines = [" ".join(rng.choices("abcdefgh", k=5)) for _ in range(16)]
        (root / f"{split}.input0").write_text("\n".join(lines) + "\n")
        (root / f"{split}.label").write_text("".join(f"{i % 2}\n" for i in range(16)))
    for part in ("input0", "label"):
        prefs = ["--trainpref", root / f"train.{part}", "--validpref", root / f"valid.{part}"]
        with argv("--only-source", *prefs, "--destdir", root / "bin" / part, "--workers", 1):
            preprocess.cli_main()
    with argv(root / "bin", *TRAIN, "--save-dir", root / "ckpt", "--max-update", 4):
        train.cli_main()
    return root


@pytest.fixture(scope="session")
def state(trained):
    return torch.load(trained / "ckpt" / "checkpoint_last.pt", weights_only=False)


def official(state):
    """As in the published archives: args is a Namespace, cfg is not there yet."""
    cfg = state["cfg"]
    args = argparse.Namespace(**vars(cfg["model"]))
    args.arch, args.optimizer = "roberta", "adam"
    args.task = args.criterion = "sentence_prediction"
    return {**state, "args": args, "cfg": None}


def hydra(state):
    """As fairseq 0.10 wrote them from hydra: cfg is a DictConfig."""
    cfg = dict(state["cfg"])
    cfg["model"] = {
        k: v for k, v in vars(cfg["model"]).items() if isinstance(v, (int, float, str, list, type(None)))
    }
    cfg["model"]["_name"] = "roberta"
    return {**state, "cfg": OmegaConf.create(cfg)}


def save(path, obj, **kwargs):
    torch.save(obj, str(path), **kwargs)
    return str(path)


class Payload:
    """Creates the marker file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


# --- What must load -----------------------------------------------------------------


def test_own_checkpoint_holds_what_the_list_says(trained, mode):
    state = checkpoint_utils.load_checkpoint_to_cpu(str(trained / "ckpt" / "checkpoint_last.pt"))
    assert isinstance(state["cfg"], DictConfig)
    assert state["extra_state"]["best"] == state["extra_state"]["val_loss"]


@pytest.mark.parametrize("style", [official, hydra])
@pytest.mark.parametrize("zipped", [True, False])
def test_styles_load(tmp_path, state, mode, style, zipped):
    """Namespace and DictConfig, in today's format and in that of torch < 1.6."""
    path = save(tmp_path / "model.pt", style(state), _use_new_zipfile_serialization=zipped)
    loaded = checkpoint_utils.load_checkpoint_to_cpu(path)
    assert isinstance(loaded["cfg"], DictConfig)
    assert loaded["cfg"].task._name == "sentence_prediction"
    torch.testing.assert_close(dict(loaded["model"]), dict(state["model"]), rtol=0, atol=0)


@pytest.mark.skipif(not checkpoints._HAS_SAFE_GLOBALS, reason="torch < 2.6 loads anything by default")
@pytest.mark.parametrize("style", [official, hydra])
def test_torch_alone_does_not_load_them(tmp_path, state, style):
    path = save(tmp_path / "model.pt", style(state))
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


@pytest.mark.parametrize("style", [dict, official, hydra])
def test_ensemble_and_hub(tmp_path, trained, state, mode, style):
    """The two ways of using a model: load_model_ensemble_and_task and the RoBERTa hub."""
    save(tmp_path / "model.pt", style(state))
    models, _, task = checkpoint_utils.load_model_ensemble_and_task(
        [str(tmp_path / "model.pt")], arg_overrides={"data": str(trained / "bin")}
    )
    assert len(models) == 1 and len(task.source_dictionary) > 8
    hub = RobertaModel.from_pretrained(
        str(tmp_path), checkpoint_file="model.pt", data_name_or_path=str(trained / "bin"), bpe=None
    )
    hub.eval()
    assert hub.extract_features(torch.tensor([[0, 5, 6, 2]])).shape == (1, 4, 8)


@pytest.mark.parametrize("style", [dict, official, hydra])
def test_training_resumes_and_validates(tmp_path, trained, state, mode, style):
    from fairseq_cli import train, validate

    path = save(tmp_path / "model.pt", style(state))
    reset = ["--reset-optimizer", "--reset-dataloader", "--reset-meters"]
    options = [*TRAIN, "--save-dir", tmp_path / "out", "--max-update", 6, "--restore-file", path]
    with argv(trained / "bin", *options, *(reset if style is not dict else [])):
        train.cli_main()
    assert (tmp_path / "out" / "checkpoint_last.pt").exists()
    with argv(
        trained / "bin",
        "--path",
        path,
        "--task",
        "sentence_prediction",
        "--num-classes",
        2,
        "--criterion",
        "sentence_prediction",
        "--batch-size",
        4,
        "--cpu",
        "--valid-subset",
        "valid",
        "--num-workers",
        0,
    ):
        validate.cli_main()


def test_ema_checkpoint(tmp_path, state, mode):
    path = save(tmp_path / "ema.pt", {**official(state), "extra_state": {"ema": dict(state["model"])}})
    loaded = checkpoint_utils.load_ema_from_checkpoint(path)
    assert set(loaded["model"]) == set(state["model"])
    (tmp_path / "bad.pt").write_bytes(pickle.dumps(Payload(tmp_path / "ran"), 2))
    with pytest.raises(checkpoints.CheckpointRefusedError, match="system"):
        checkpoint_utils.load_ema_from_checkpoint(str(tmp_path / "bad.pt"))
    assert not (tmp_path / "ran").exists()


NUMBERS = [np.float64(0.25), np.float32(1.5), np.int64(-3), np.bool_(True), np.float16(2), np.uint8(7)]


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_numpy_numbers_by_either_name(tmp_path, mode, module):
    """np.float64 best scores, as numpy 1 and numpy 2 name them; type and value come back."""
    raw = pickle.dumps(NUMBERS, 2)
    here = np.float64(0).__reduce__()[0].__module__
    raw = raw.replace(f"c{here}\n".encode(), f"c{module}\n".encode())
    assert checkpoint_load(tmp_path, raw) == NUMBERS
    assert [type(n) for n in checkpoint_load(tmp_path, raw)] == [type(n) for n in NUMBERS]


def checkpoint_load(tmp_path, raw):
    """Read a bare pickle as the data of a legacy torch file."""
    head = b"".join(pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    (tmp_path / "legacy.pt").write_bytes(head + raw + pickle.dumps([], 2))
    with checkpoints._torch_load_as(checkpoints._read_safely), open(tmp_path / "legacy.pt", "rb") as f:
        return torch.load(f)


def test_meters_under_both_names(tmp_path, mode):
    average = meters.AverageMeter(round=3)
    average.update(4.0)
    raw = pickle.dumps([average, meters.TimeMeter(), meters.StopwatchMeter()], 2)
    for old in (raw, raw.replace(b"cfairseq.logging.meters\n", b"cfairseq.meters\n")):
        loaded = checkpoint_load(tmp_path, old)
        assert [type(m).__name__ for m in loaded] == ["AverageMeter", "TimeMeter", "StopwatchMeter"]
        assert loaded[0].avg == 4.0


def test_rank_0_hands_a_checkpoint_on(tmp_path, state, monkeypatch):
    """Two ranks: what rank 0 has read (a typed DictConfig among it) arrives on rank 1."""
    loaded = checkpoint_utils.load_checkpoint_to_cpu(save(tmp_path / "model.pt", official(state)))
    message = {"cfg": loaded["cfg"], "args": loaded["args"], "p": distributed_utils._TensorPlaceholder(3)}
    sent = []
    cpu = torch.device("cpu")
    monkeypatch.setattr(distributed_utils, "get_rank", lambda group: 0)
    monkeypatch.setattr(
        distributed_utils, "broadcast", lambda tensor, src, group: sent.append(tensor.clone())
    )
    distributed_utils._broadcast_object_slow(message, 0, None, cpu)
    monkeypatch.setattr(distributed_utils, "get_rank", lambda group: 1)
    monkeypatch.setattr(distributed_utils, "broadcast", lambda tensor, src, group: tensor.copy_(sent.pop(0)))
    received = distributed_utils._broadcast_object_slow(None, 0, None, cpu)
    assert str(received["cfg"]) == str(message["cfg"])  # == fails on a Namespace in omegaconf 2.0
    assert (received["args"], received["p"]) == (message["args"], message["p"])


# --- What must not run -----------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["alone", "extra_state", "cfg", "args"])
def test_hostile_file_is_refused_and_does_not_run(tmp_path, state, mode, zipped, where):
    payload = Payload(tmp_path / "ran")
    cfg = OmegaConf.create({})
    cfg.__dict__["_content"] = {"x": payload}
    hostile = {
        "alone": payload,
        "extra_state": {**state, "extra_state": {"train_iterator": {"deep": [payload]}}},
        "cfg": {**state, "cfg": cfg},
        "args": {**state, "args": argparse.Namespace(x=payload)},
    }[where]
    path = save(tmp_path / "hostile.pt", hostile, _use_new_zipfile_serialization=zipped)
    with pytest.raises(checkpoints.CheckpointRefusedError) as error:
        checkpoint_utils.load_checkpoint_to_cpu(path)
    assert "hostile.pt" in str(error.value) and f"{os.system.__module__}.system" in str(error.value)
    assert "weights_only" not in str(error.value)  # no advice to switch the protection off
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_bare_pickle_is_refused(tmp_path, mode, protocol):
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Payload(tmp_path / "ran"), protocol))
    with pytest.raises(
        (checkpoints.CheckpointRefusedError, checkpoints.CheckpointDamagedError), match=r"bare\.pt"
    ):
        checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "bare.pt"))
    assert not (tmp_path / "ran").exists()


GADGETS = {
    "eval": b"c__builtin__\neval\n(X\x01\x00\x00\x001tR.",
    "getattr": b"c__builtin__\ngetattr\n(cargparse\nNamespace\nX\x08\x00\x00\x00__init__tR.",
    "dotted name": b"cargparse\nNamespace.__init__.__globals__\n.",
    "factory": b"ccollections\ndefaultdict\n(cposix\nsystem\ntR.",
    "state of a class": b"cargparse\nNamespace\n(N}X\x04\x00\x00\x00evilK\x01stb.",
    "state of a function": b"c_codecs\nencode\n}X\x04\x00\x00\x00evilK\x01sb.",
    "call of an instance": b"cargparse\nNamespace\n)R)R.",
    "object scalar": b"cnumpy.core.multiarray\nscalar\n("
    b"cnumpy\ndtype\n(X\x02\x00\x00\x00O8tRX\x01\x00\x00\x00xtR.",
    "void scalar": b"cnumpy\ndtype\n(X\x02\x00\x00\x00V8tR.",
    "structured dtype": b"cnumpy\ndtype\n(X\x02\x00\x00\x00f8tR"
    b"(K\x03X\x01\x00\x00\x00<N(X\x01\x00\x00\x00at}K\x08K\x01K\x1ftb.",
}


@pytest.mark.parametrize("name", GADGETS)
def test_no_way_round_through_listed_classes(tmp_path, mode, name):
    with pytest.raises((checkpoints.CheckpointRefusedError, checkpoints.CheckpointDamagedError)):
        checkpoint_load(tmp_path, b"\x80\x02" + GADGETS[name])
    assert not hasattr(argparse.Namespace, "evil")


def test_hostile_setstate_of_a_class_that_is_not_listed(tmp_path, mode):
    """BUILD is refused, not only REDUCE: this class would act in __setstate__."""
    raw = b"\x80\x02c" + __name__.encode() + b"\nActsInSetState\n)\x81}b."
    ActsInSetState.ran = False
    with pytest.raises(checkpoints.CheckpointRefusedError, match="ActsInSetState"):
        checkpoint_load(tmp_path, raw)
    assert not ActsInSetState.ran


class ActsInSetState:
    ran = False

    def __setstate__(self, state):
        type(self).ran = True


def test_torchscript_is_refused(tmp_path, mode):
    path = str(tmp_path / "program.pt")
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), path)
    with pytest.raises(checkpoints.CheckpointRefusedError, match=r"program\.pt"):
        checkpoint_utils.load_checkpoint_to_cpu(path)


@pytest.mark.parametrize(
    "value", ["__import__('os').mkdir({!r}) or True", "[None for x in ()] or open({!r}, 'w')"]
)
def test_option_strings_of_a_checkpoint_are_not_run(tmp_path, value):
    """fairseq evals decoder_attention and its like when it builds the model."""
    from fairseq import utils
    from fairseq.models import fconv

    marker = str(tmp_path / "ran")
    for evaluate in (utils.eval_bool, utils.eval_str_list, utils.eval_str_dict, fconv.eval):
        with pytest.raises(ValueError, match="refused to evaluate"):
            evaluate(value.format(marker))
    assert not os.path.exists(marker)


@pytest.mark.parametrize(
    ("source", "value"),
    [
        ("(0.9, 0.98)", (0.9, 0.98)),
        ("[(512, 10, 5)] + [(512, 3, 2)] * 2", [(512, 10, 5), (512, 3, 2), (512, 3, 2)]),
        (" True", True),
        ("{'a': -1, 'b': None}", {"a": -1, "b": None}),
        ("1-1/4", 0.75),
    ],
)
def test_literal_eval_is_eval_for_options(source, value):
    assert checkpoints.literal_eval(source) == value


def test_literal_eval_keeps_fairseq_defaults():
    from fairseq import utils

    assert utils.eval_bool(None, default=True) is True
    assert utils.eval_str_list("1,2", type=int) == [1, 2]


# --- Messages, and what to do about them -----------------------------------------------------


def test_message_names_the_remedy_and_the_remedy_works(tmp_path, state, mode, monkeypatch):
    monkeypatch.setattr(checkpoints, "_allowed_by_user", {})
    path = save(tmp_path / "extra.pt", {**state, "mine": ActsInSetState()})
    name = f"{__name__}.ActsInSetState"
    with pytest.raises(checkpoints.CheckpointRefusedError) as error:
        checkpoint_utils.load_checkpoint_to_cpu(path)
    assert f'checkpoints.allow("{name}")' in str(error.value)
    assert (f"add_safe_globals([{name}])" in str(error.value)) == hasattr(
        torch.serialization, "add_safe_globals"
    )
    checkpoints.allow(name)
    assert isinstance(checkpoint_utils.load_checkpoint_to_cpu(path)["mine"], ActsInSetState)


@pytest.mark.skipif(not hasattr(torch.serialization, "add_safe_globals"), reason="torch < 2.4")
def test_torchs_own_list_is_honoured_and_left_as_it_was(tmp_path, state, mode):
    path = save(tmp_path / "extra.pt", {**state, "mine": ActsInSetState()})
    before = list(torch.serialization.get_safe_globals())
    mine = {ActsInSetState, argparse.Namespace}
    if mode == "torch":  # under the very name that the plugin lends
        mine.add((DictConfig, "omegaconf.dictconfig.DictConfig"))
    torch.serialization.add_safe_globals(list(mine))
    try:
        checkpoint_utils.load_checkpoint_to_cpu(path)
        now = torch.serialization.get_safe_globals()
        assert set(now) == {*before, *mine}
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


@pytest.mark.parametrize("name", ["Namespace", "os.system", "posix.system", "sys.exit"])
def test_allow_rejects(name):
    with pytest.raises(ValueError, match="allow"):
        checkpoints.allow(name)


@pytest.mark.parametrize("damage", ["cut", "half", "empty", "text", "zeros", "legacy cut"])
def test_damaged_file(tmp_path, state, mode, damage):
    data = io.BytesIO()
    torch.save(state, data, _use_new_zipfile_serialization=damage != "legacy cut")
    raw = data.getvalue()
    path = tmp_path / "damaged.pt"
    path.write_bytes(
        {
            "cut": raw[:-100],
            "half": raw[: len(raw) // 2],
            "empty": b"",
            "text": b"hello, world\n",
            "zeros": bytes(1000),
            "legacy cut": raw[:-100],
        }[damage]
    )
    with pytest.raises((checkpoints.CheckpointDamagedError, checkpoints.CheckpointRefusedError)) as error:
        checkpoint_utils.load_checkpoint_to_cpu(str(path))
    assert "damaged.pt" in str(error.value)
    if "cut" in damage or damage in ("half", "empty"):
        assert isinstance(error.value, checkpoints.CheckpointDamagedError)


# --- The seam ----------------------------------------------------------------------------------


def test_install_twice_is_harmless():
    names = ["load_checkpoint_to_cpu", "load_ema_from_checkpoint"]
    once = [getattr(checkpoint_utils, n) for n in names] + [distributed_utils._broadcast_object_slow]
    checkpoints.install()
    assert once == [getattr(checkpoint_utils, n) for n in names] + [distributed_utils._broadcast_object_slow]
    assert not hasattr(once[0].__wrapped__, "_deltasam_reader")


def test_torch_load_is_back_even_after_an_error(tmp_path, state):
    before = torch.load
    safe = list(getattr(torch.serialization, "get_safe_globals", list)())
    (tmp_path / "empty.pt").write_bytes(b"")
    with pytest.raises(checkpoints.CheckpointDamagedError):
        checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "empty.pt"))
    with pytest.raises(FileNotFoundError):
        checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "missing.pt"))
    checkpoint_utils.load_checkpoint_to_cpu(save(tmp_path / "good.pt", state))
    assert torch.load is before
    assert list(getattr(torch.serialization, "get_safe_globals", list)()) == safe


def test_nested_readers_and_other_threads(tmp_path):
    """The innermost reader counts, each comes back in turn, other threads are left alone."""
    path = save(tmp_path / "slow.pt", ActsInSetState())
    before = torch.load
    seen = []
    with checkpoints._torch_load_as(checkpoints._read_safely):
        outer = torch.load
        with checkpoints._torch_load_as(checkpoints._read_from_peer):
            assert isinstance(torch.load(path), ActsInSetState)
            with checkpoints._torch_load_as(checkpoints._read_safely), pytest.raises(pickle.UnpicklingError):
                torch.load(path, weights_only=False)
        assert torch.load is outer
        thread = threading.Thread(target=lambda: seen.append(torch.load(path, weights_only=False)))
        thread.start()
        thread.join()
    assert torch.load is before
    assert isinstance(seen[0], ActsInSetState)


def test_restricted_unpickler_alone():
    """As torch < 2.6 uses it: passed as pickle_module to torch.load."""
    tensors = {
        "w": torch.arange(6.0).view(2, 3),
        "h": torch.ones(2, dtype=torch.bfloat16),
        "n": collections.OrderedDict(a=1),
    }
    for zipped in (True, False):
        data = io.BytesIO()
        torch.save(
            {**tensors, "p": torch.nn.Parameter(torch.ones(1))}, data, _use_new_zipfile_serialization=zipped
        )
        data.seek(0)
        loaded = torch.load(data, pickle_module=checkpoints.restricted_pickle, weights_only=False)
        torch.testing.assert_close(loaded["w"], tensors["w"])
        assert loaded["h"].dtype == torch.bfloat16 and isinstance(loaded["p"], torch.nn.Parameter)
    with pytest.raises(pickle.UnpicklingError, match=r"builtins\.eval"):
        checkpoints.restricted_pickle.loads(b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.")
    value = argparse.Namespace(a=[1, {"b": (2.0, None)}])
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        data = pickle.dumps(value, protocol)
        if protocol < 2:  # needs copyreg._reconstructor, which creates any class
            with pytest.raises(pickle.UnpicklingError):
                checkpoints.restricted_pickle.loads(data)
        else:
            assert checkpoints.restricted_pickle.loads(data) == value


def test_allow_list_has_no_way_to_run_code():
    """Every entry is a class that stores what it is given, or ours."""
    table = checkpoints.allowed_globals()
    assert {"argparse.Namespace", "omegaconf.dictconfig.DictConfig", "fairseq.meters.AverageMeter"} <= set(
        table
    )
    for name, found in table.items():
        module = name.rpartition(".")[0]
        assert module not in checkpoints._BLOCKED_MODULES
        assert isinstance(found, type) or name == "typing.Any" or found is checkpoints._scalar
    assert np.dtype not in table.values()


# --- A file that is not there -------------------------------------------------------------------


def config(save_dir, **changes):
    return types.SimpleNamespace(
        **{
            "save_dir": str(save_dir),
            "restore_file": "checkpoint_last.pt",
            "checkpoint_suffix": "",
            "finetune_from_model": None,
            "continue_once": None,
            **changes,
        }
    )


def test_defaults_require_nothing(tmp_path):
    checkpoints.require_restore_file(config(tmp_path / "not made yet"))


@pytest.mark.parametrize("option", ["restore_file", "finetune_from_model", "continue_once"])
def test_missing_file_is_an_error(tmp_path, option):
    path = tmp_path / "roberta.pt"
    flag = "--" + option.replace("_", "-")
    for missing in (path, tmp_path, "s3://bucket/roberta.pt"):  # a folder is no checkpoint either
        with pytest.raises(FileNotFoundError, match=f"{flag} {missing}.*leave {flag} out"):
            checkpoints.require_restore_file(config(tmp_path, **{option: str(missing)}))
    path.touch()
    checkpoints.require_restore_file(config(tmp_path, **{option: str(path)}))


def test_suffix_is_that_of_fairseq(tmp_path):
    (tmp_path / "m.pt").touch()
    cfg = config(tmp_path, restore_file=str(tmp_path / "m.pt"), checkpoint_suffix="-shard1")
    with pytest.raises(FileNotFoundError, match=r"looked for .*m-shard1\.pt"):
        checkpoints.require_restore_file(cfg)
    checkpoints.require_restore_file(cfg, suffix="")
    (tmp_path / "m-shard1.pt").touch()
    checkpoints.require_restore_file(cfg)


def test_finetune_is_needed_on_the_first_launch_only(tmp_path):
    cfg = config(tmp_path, finetune_from_model=str(tmp_path / "gone.pt"))
    with pytest.raises(FileNotFoundError, match="--finetune-from-model"):
        checkpoints.require_restore_file(cfg)
    (tmp_path / "checkpoint_last.pt").touch()
    checkpoints.require_restore_file(cfg)


def test_remote_files_are_left_to_path_manager(monkeypatch):
    asked = []
    monkeypatch.setattr(checkpoints.PathManager, "isfile", staticmethod(lambda p: asked.append(p) or True))
    checkpoints.require_restore_file(config("s3://out", restore_file="s3://bucket/m.pt"))
    assert asked == ["s3://bucket/m.pt"]
