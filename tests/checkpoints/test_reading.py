"""What fairseq has written loads, by both readers and by every way of using a checkpoint."""

import pickle

import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.logging import meters
from fairseq.models.roberta import RobertaModel
from omegaconf import DictConfig

from deltasam_fairseq import checkpoints
from deltasam_fairseq.checkpoints import reading
from tests.checkpoints.saved import TRAIN, Payload, argv, checkpoint_load, hydra, official, save


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


@pytest.mark.skipif(not reading.HAS_SAFE_GLOBALS, reason="torch < 2.6 loads anything by default")
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


VALIDATE = (
    "--task sentence_prediction --num-classes 2 --criterion sentence_prediction "
    "--batch-size 4 --cpu --valid-subset valid --num-workers 0"
).split()


@pytest.mark.parametrize("style", [dict, official, hydra])
def test_training_resumes_and_validates(tmp_path, trained, state, mode, style):
    from fairseq_cli import train, validate

    path = save(tmp_path / "model.pt", style(state))
    reset = ["--reset-optimizer", "--reset-dataloader", "--reset-meters"]
    options = [*TRAIN, "--save-dir", tmp_path / "out", "--max-update", 6, "--restore-file", path]
    with argv(trained / "bin", *options, *(reset if style is not dict else [])):
        train.cli_main()
    assert (tmp_path / "out" / "checkpoint_last.pt").exists()
    with argv(trained / "bin", "--path", path, *VALIDATE):
        validate.cli_main()


def test_ema_checkpoint(tmp_path, state, mode):
    path = save(
        tmp_path / "ema.pt", {**official(state), "extra_state": {"ema": dict(state["model"])}}
    )
    loaded = checkpoint_utils.load_ema_from_checkpoint(path)
    assert set(loaded["model"]) == set(state["model"])
    (tmp_path / "bad.pt").write_bytes(pickle.dumps(Payload(tmp_path / "ran"), 2))
    with pytest.raises(checkpoints.CheckpointRefusedError, match="system"):
        checkpoint_utils.load_ema_from_checkpoint(str(tmp_path / "bad.pt"))
    assert not (tmp_path / "ran").exists()


NUMBERS = [
    np.float64(0.25),
    np.float32(1.5),
    np.int64(-3),
    np.bool_(True),
    np.float16(2),
    np.uint8(7),
]


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_numpy_numbers_by_either_name(tmp_path, mode, module):
    """np.float64 best scores, as numpy 1 and numpy 2 name them; type and value come back."""
    raw = pickle.dumps(NUMBERS, 2)
    here = np.float64(0).__reduce__()[0].__module__
    raw = raw.replace(f"c{here}\n".encode(), f"c{module}\n".encode())
    assert checkpoint_load(tmp_path, raw) == NUMBERS
    assert [type(n) for n in checkpoint_load(tmp_path, raw)] == [type(n) for n in NUMBERS]


def test_meters_under_both_names(tmp_path, mode):
    average = meters.AverageMeter(round=3)
    average.update(4.0)
    raw = pickle.dumps([average, meters.TimeMeter(), meters.StopwatchMeter()], 2)
    for old in (raw, raw.replace(b"cfairseq.logging.meters\n", b"cfairseq.meters\n")):
        loaded = checkpoint_load(tmp_path, old)
        assert [type(m).__name__ for m in loaded] == ["AverageMeter", "TimeMeter", "StopwatchMeter"]
        assert loaded[0].avg == 4.0
