"""What benchmark.py compares: one update of each method on the same model and the same batches."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

import torch
from fairseq import options, tasks
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

import deltasam_fairseq
from deltasam_fairseq import SharpnessAwareTrainer
from deltasam_fairseq.trainer.ascent import autocast

Sample = Dict[str, Any]
Update = Callable[[List[Sample]], None]

SHAPES = {
    "small": "--arch roberta --encoder-layers 4 --encoder-embed-dim 256 "
    "--encoder-ffn-embed-dim 1024 --encoder-attention-heads 4",
    "base": "--arch roberta_base",
    "large": "--arch roberta_large",
}
VOCABULARY = {"small": 8192, "base": 50265, "large": 50265}
PRECISIONS = {
    "fp32": "",
    "fp16": "--fp16",
    "bf16": "--bf16",
    "memory-efficient-fp16": "--memory-efficient-fp16",
    "memory-efficient-bf16": "--memory-efficient-bf16",
    "amp": "--amp",
}
TWO_FORWARDS = "delta-SAM, two forwards"
OURS = {  # method -> options of fairseq-train
    "Adam": "--optimizer sam_adam --sam-rho 0",  # with the step that SAM's has
    "Adam, fairseq": "--optimizer adam",
    "Adam, foreach": "--optimizer sam_adam --sam-rho 0 --adam-step foreach",
    "Adam, fused": "--optimizer sam_adam --sam-rho 0 --adam-step fused",
    "SAM": "--optimizer sam_adam",
    "delta-SAM": "--optimizer delta_sam_adam",
    TWO_FORWARDS: "--optimizer delta_sam_adam",
    "SAM, a quarter": "--optimizer sam_adam --sam-ascent-fraction 0.25",
    "delta-SAM, a quarter": "--optimizer delta_sam_adam --sam-ascent-fraction 0.25",
    "SAM, every 2nd": "--optimizer sam_adam --sam-every 2",
    "SAM, layer norms": "--optimizer sam_adam --sam-only layer_norm",
}
TORCH, DAVDA54, PYTORCH_OPTIMIZER = "SAM, torch loop", "SAM, davda54", "SAM, pytorch_optimizer"
PEERS = (TORCH, DAVDA54, PYTORCH_OPTIMIZER)
RHO = 0.05


class Setting(NamedTuple):
    """What all methods of one comparison share."""

    shape: str
    batch_size: int
    length: int  # tokens of every sentence
    update_freq: int
    precision: str
    device: str
    processes: int = 1
    rank: int = 0
    launch: Sequence[str] = ()  # fairseq's options for several processes


class Built(NamedTuple):
    """A method: its update, and the trainer that makes it or whose model it trains.

    ``period`` updates are timed together where they are not all alike.
    """

    update: Update
    trainer: Any
    period: int = 1


class NotHere(Exception):
    """A method cannot run here; the message says why."""


def arguments(setting: Setting, folder: Path) -> List[str]:
    """Return fairseq-train's options; writes the dictionaries that the task reads."""
    words, labels = Dictionary(), Dictionary()
    for i in range(VOCABULARY[setting.shape] - len(words)):
        words.add_symbol(str(i))
    for label in "01":
        labels.add_symbol(label)
    for name, dictionary in (("input0", words), ("label", labels)):
        (folder / name).mkdir(parents=True)
        dictionary.save(str(folder / name / "dict.txt"))
    shared = (
        "--task sentence_prediction --criterion sentence_prediction --num-classes 2 --init-token 0 "
        "--max-positions 512 --classification-head-name sentence_classification_head "
        "--lr 1e-5 --adam-betas (0.9,0.98) --adam-eps 1e-6 --weight-decay 0.1 --max-update 100000 "
        "--find-unused-parameters --fp16-init-scale 4 --no-save"
    )
    argv = [str(folder), *shared.split(), *SHAPES[setting.shape].split()]
    argv += PRECISIONS[setting.precision].split()
    argv += ["--update-freq", str(setting.update_freq), "--save-dir", str(folder / "save")]
    argv += ["--user-dir", deltasam_fairseq.__path__[0], *setting.launch]
    return [*argv, "--cpu"] if setting.device == "cpu" else argv


def build_trainer(argv: Sequence[str], before: Optional[Callable[[Any], Any]] = None) -> Any:
    """Return a trainer as fairseq-train makes it; ``before`` is called with its configuration."""
    parser = options.get_training_parser()
    try:
        parsed = options.parse_args_and_arch(parser, list(argv))
    except SystemExit as error:
        raise NotHere("fairseq-train does not take these options") from error
    cfg = convert_namespace_to_omegaconf(parsed)
    if before is not None:
        before(cfg)
    torch.manual_seed(cfg.common.seed)
    task = tasks.setup_task(cfg.task)
    model, criterion = task.build_model(cfg.model), task.build_criterion(cfg.criterion)
    return SharpnessAwareTrainer(cfg, task, model, criterion)


def samples_of(setting: Setting, count: int, seed: int = 1) -> List[Sample]:
    """Return micro-batches of random sentences, other ones for every rank, as the task collates."""
    generator = torch.Generator().manual_seed(seed * setting.processes + setting.rank)
    shape = (setting.batch_size, setting.length)
    found = []
    for _ in range(count):
        tokens = torch.randint(4, VOCABULARY[setting.shape] - 4, shape, generator=generator)
        tokens[:, 0], tokens[:, -1] = 0, 2
        target = torch.randint(0, 2, (shape[0], 1), generator=generator)
        net_input = {"src_tokens": tokens, "src_lengths": torch.full((shape[0],), shape[1])}
        found.append(
            {
                "id": torch.arange(shape[0]),
                "net_input": net_input,
                "target": target,
                "nsentences": shape[0],
                "ntokens": tokens.numel(),
            }
        )
    return found


def forwards_first(trainer: Any) -> Update:
    """Return delta-SAM's update with a forward of its own for the losses at w, as in the paper."""

    def update(samples: List[Sample]) -> None:
        sample, _ = trainer._prepare_sample(samples[0])
        with torch.autograd.profiler.record_function("sam-forward-nograd"):
            with torch.no_grad(), autocast(trainer.cfg):
                trainer.get_criterion()(trainer.get_model(), sample)
        trainer.train_step(samples)

    return update


def peer(name: str, setting: Setting, folder: Path, davda54: Optional[Path]) -> Built:
    """Return a public SAM on the same model, with torch's AdamW.

    As its README has it: two passes, no clipping, no log.
    """
    if setting.precision != "fp32":
        raise NotHere("the peers have no half precision")
    if setting.processes > 1:
        raise NotHere("the peers are compared in one process")
    trainer = build_trainer([*arguments(setting, folder), "--optimizer", "adam"])
    model, criterion = trainer.model, trainer.get_criterion()
    params = [p for p in model.parameters() if p.requires_grad]
    hyperparameters: Dict[str, Any] = {"lr": 1e-5, "betas": (0.9, 0.98), "eps": 1e-6}
    hyperparameters["weight_decay"] = 0.1

    def backward(samples: List[Sample]) -> None:
        model.train()
        for sample in samples:
            loss, sample_size, _ = criterion(model, sample)
            (loss / (sample_size * len(samples))).backward()

    if name == TORCH:
        return Built(torch_loop(params, hyperparameters, backward, trainer), trainer)
    if name == DAVDA54:
        cls = class_of_file(davda54)
    else:
        try:
            from pytorch_optimizer import SAM as cls  # type: ignore[import-not-found,no-redef]
        except ImportError as error:
            raise NotHere("pip install pytorch_optimizer") from error
    optimizer = cls(params, base_optimizer=torch.optim.AdamW, rho=RHO, **hyperparameters)

    def update(samples: List[Sample]) -> None:
        samples = [trainer._prepare_sample(sample)[0] for sample in samples]
        backward(samples)
        optimizer.first_step(zero_grad=True)
        backward(samples)
        optimizer.second_step(zero_grad=True)

    return Built(update, trainer)


def class_of_file(path: Optional[Path]) -> Any:
    """Return the class SAM of davda54's sam.py."""
    if path is None:
        raise NotHere("give --davda54 FILE, the sam.py of github.com/davda54/sam")
    spec = importlib.util.spec_from_file_location("davda54_sam", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise NotHere(f"--davda54 {path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "SAM"):
        raise NotHere(f"--davda54 {path}: has no class SAM")
    return module.SAM


def torch_loop(
    params: List[torch.nn.Parameter],
    hyperparameters: Dict[str, Any],
    backward: Update,
    trainer: Any,
) -> Update:
    """Return SAM in a dozen lines of torch: the least that one can write by hand."""
    optimizer = torch.optim.AdamW(params, **hyperparameters)

    def update(samples: List[Sample]) -> None:
        samples = [trainer._prepare_sample(sample)[0] for sample in samples]
        backward(samples)
        with torch.no_grad():
            climbing = [p for p in params if p.grad is not None]
            norms = torch.stack([p.grad.norm() for p in climbing if p.grad is not None])
            scale = RHO / (norms.norm() + 1e-12)
            saved = [p.clone() for p in climbing]
            for p in climbing:
                if p.grad is not None:
                    p.add_(p.grad * scale)
        optimizer.zero_grad()
        backward(samples)
        with torch.no_grad():
            for p, own in zip(climbing, saved):
                p.copy_(own)
        optimizer.step()
        optimizer.zero_grad()

    return update


def build(name: str, setting: Setting, davda54: Optional[Path] = None, before: Any = None) -> Built:
    """Build a method.

    Raises:
        NotHere: it cannot run here.
    """
    with tempfile.TemporaryDirectory() as folder:
        if name in PEERS:
            return peer(name, setting, Path(folder) / "data", davda54)
        if "adam-step" in OURS[name] and setting.precision.startswith("memory-efficient"):
            raise NotHere("weights that are not float32 take the loop")
        if name == TWO_FORWARDS and setting.update_freq > 1:
            raise NotHere("the same program as delta-SAM, which has it with several micro-batches")
        argv = arguments(setting, Path(folder) / "data")
        trainer = build_trainer([*argv, *OURS[name].split()], before)
    trainer.reset_dummy_batch(samples_of(setting, 1)[0])
    update = forwards_first(trainer) if name == TWO_FORWARDS else trainer.train_step
    return Built(update, trainer, getattr(trainer.cfg.optimizer, "sam_every", 1))
