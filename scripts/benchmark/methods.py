"""Build the methods to compare: one update of each on the same model and batches."""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

import torch
from fairseq import options, tasks
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.distributed.utils import distributed_init

import deltasam_fairseq
from deltasam_fairseq import SharpnessAwareTrainer
from deltasam_fairseq.trainer.ascent import autocast

Sample = Dict[str, Any]
Update = Callable[[List[Sample]], Any]

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
    "Adam": "--optimizer sam_adam --sam-rho 0",  # with the base step that SAM has
    "Adam, fairseq": "--optimizer adam",
    "Adam, foreach": "--optimizer sam_adam --sam-rho 0 --adam-step foreach",
    "Adam, fused": "--optimizer sam_adam --sam-rho 0 --adam-step fused",
    "SAM": "--optimizer sam_adam",
    "delta-SAM": "--optimizer delta_sam_adam",
    TWO_FORWARDS: "--optimizer delta_sam_adam",
    "SAM, rank": "--optimizer sam_adam --sam-scope rank",
    "delta-SAM, rank": "--optimizer delta_sam_adam --sam-scope rank",
    "SAM, a quarter": "--optimizer sam_adam --sam-ascent-fraction 0.25",
    "delta-SAM, a quarter": "--optimizer delta_sam_adam --sam-ascent-fraction 0.25",
    "SAM, every 2nd": "--optimizer sam_adam --sam-every 2",
    "SAM, layer norms": "--optimizer sam_adam --sam-only layer_norm",
    "GSAM": "--optimizer sam_adam --sam-gsam-alpha 0.4",
    "functional SAM": "--optimizer sam_adam --sam-functional",
    "SAM, Fisher mask": "--optimizer sam_adam --sam-mask fisher",  # not its renewals
    "SAM, Fisher mask renewed": "--optimizer sam_adam --sam-mask fisher --sam-mask-every 1",
    "RW-SAM": "--optimizer delta_sam_adam --delta-sam-weights gibbs",
    "m-sharpness, 4": "--optimizer sam_adam --sam-micro 4",
    "m-sharpness, 1": "--optimizer sam_adam --sam-micro 1",
    "TRAM": "--optimizer sam_adam --sam-radius trust_region",
    "TRAM-theta": "--optimizer sam_adam --sam-radius trust_region_theta",
}
TORCH, DAVDA54, PYTORCH_OPTIMIZER = "SAM, torch loop", "SAM, davda54", "SAM, pytorch_optimizer"
OTHER_SAMS = (TORCH, DAVDA54, PYTORCH_OPTIMIZER)
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

    @property
    def title(self) -> str:
        """One line that names the setting."""
        parts = [f"RoBERTa {self.shape}", self.device, self.precision]
        parts.append(f"{self.batch_size} sentences of {self.length} tokens")
        if self.update_freq > 1:
            parts.append(f"{self.update_freq} micro-batches an update")
        if self.processes > 1:
            parts.append(f"{self.processes} processes")
        return ", ".join(parts)


class Built(NamedTuple):
    """A method: its update, and the trainer that makes it or whose model it trains.

    Updates that differ from each other are timed in groups of ``period``.
    """

    update: Update
    trainer: Any
    period: int = 1


class MethodUnavailable(Exception):
    """A method cannot run with this setting or installation; the message says why."""


def arguments(setting: Setting, folder: Path) -> List[str]:
    """Write the dictionaries that the task reads; return fairseq-train's options."""
    words, labels = Dictionary(), Dictionary()
    for i in range(VOCABULARY[setting.shape] - len(words)):
        words.add_symbol(str(i))
    for label in "01":
        labels.add_symbol(label)
    for name, dictionary in (("input0", words), ("label", labels)):
        (folder / name).mkdir(parents=True)
        dictionary.save(str(folder / name / "dict.txt"))
    cuda = setting.device == "cuda"
    text = (
        "--task sentence_prediction --criterion sentence_prediction --num-classes 2 --init-token 0 "
        "--max-positions 512 --classification-head-name sentence_classification_head "
        "--lr 1e-5 --adam-betas (0.9,0.98) --adam-eps 1e-6 --weight-decay 0.1 --max-update 100000 "
        f"--find-unused-parameters --fp16-init-scale 4 --no-save {SHAPES[setting.shape]} "
        f"{PRECISIONS[setting.precision]} --update-freq {setting.update_freq} "
    )
    if setting.processes > 1:
        text += (
            f"--distributed-world-size {setting.processes} --distributed-rank {setting.rank} "
            "--distributed-init-method env:// --distributed-no-spawn --ddp-backend legacy_ddp "
            f"--distributed-backend {'nccl' if cuda else 'gloo'} "
        )
    text += f"--device-id {setting.rank}" if cuda else "--cpu"
    paths = ["--save-dir", str(folder / "save"), "--user-dir", deltasam_fairseq.__path__[0]]
    return [str(folder), *paths, *text.split()]


def build_trainer(argv: Sequence[str], model: Any = None) -> Any:
    """Return a trainer as fairseq-train makes it.

    Args:
        model: to copy; without it, one is built, and its weights are drawn on the processor.

    Raises:
        MethodUnavailable: fairseq-train refuses an option; its own message is on stderr.
    """
    parser = options.get_training_parser()
    try:
        parsed = options.parse_args_and_arch(parser, list(argv))
    except SystemExit as error:
        raise MethodUnavailable("fairseq-train does not take these options") from error
    cfg = convert_namespace_to_omegaconf(parsed)
    if cfg.distributed_training.distributed_init_method:
        distributed_init(cfg)
    torch.manual_seed(cfg.common.seed)
    task = tasks.setup_task(cfg.task)
    model = task.build_model(cfg.model) if model is None else copy.deepcopy(model)
    return SharpnessAwareTrainer(cfg, task, model, task.build_criterion(cfg.criterion))


def random_batches(setting: Setting, count: int, seed: int = 1) -> List[Sample]:
    """Return micro-batches of random sentences as the task collates; every rank has its own."""
    generator = torch.Generator().manual_seed(seed * setting.processes + setting.rank)
    n, length = setting.batch_size, setting.length
    found = []
    for _ in range(count):
        tokens = torch.randint(4, VOCABULARY[setting.shape] - 4, (n, length), generator=generator)
        tokens[:, 0], tokens[:, -1] = 0, 2
        found.append(
            {
                "id": torch.arange(n),
                "net_input": {"src_tokens": tokens, "src_lengths": torch.full((n,), length)},
                "target": torch.randint(0, 2, (n, 1), generator=generator),
                "nsentences": n,
                "ntokens": tokens.numel(),
            }
        )
    return found


def with_clean_forward(trainer: Any) -> Update:
    """Return delta-SAM's update with a separate forward for the losses at w, as in the paper."""

    def update(samples: List[Sample]) -> None:
        sample, _ = trainer._prepare_sample(samples[0])
        with torch.autograd.profiler.record_function("sam-forward-nograd"):
            with torch.no_grad(), autocast(trainer.cfg):
                trainer.get_criterion()(trainer.get_model(), sample)
        trainer.train_step(samples)

    return update


def build_other_sam(
    name: str, setting: Setting, folder: Path, davda54: Optional[Path], model: Any
) -> Built:
    """Return a public SAM on the same model, with torch's AdamW.

    As its README has it: two passes, no clipping, no log.
    """
    if setting.precision != "fp32":
        raise MethodUnavailable("other SAMs have no half precision")
    if setting.processes > 1:
        raise MethodUnavailable("other SAMs are compared in one process")
    cls: Any = None
    if name != TORCH:
        cls = sam_from_file(davda54) if name == DAVDA54 else sam_from_pytorch_optimizer()
    trainer = build_trainer([*arguments(setting, folder), "--optimizer", "adam"], model)
    model, criterion = trainer.model, trainer.get_criterion()
    params = [p for p in model.parameters() if p.requires_grad]
    adam = {"lr": 1e-5, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1}

    def backward(samples: List[Sample]) -> None:
        model.train()
        for sample in samples:
            loss, sample_size, _ = criterion(model, sample)
            (loss / (sample_size * len(samples))).backward()

    optimizer = (cls or TorchLoop)(params, base_optimizer=torch.optim.AdamW, rho=RHO, **adam)

    def update(samples: List[Sample]) -> None:
        samples = [trainer._prepare_sample(sample)[0] for sample in samples]
        backward(samples)
        optimizer.first_step(zero_grad=True)
        backward(samples)
        optimizer.second_step(zero_grad=True)

    return Built(update, trainer)


def sam_from_file(path: Optional[Path]) -> Any:
    """Return the class SAM of davda54's sam.py."""
    if path is None:
        raise MethodUnavailable("give --davda54 FILE, the sam.py of github.com/davda54/sam")
    spec = importlib.util.spec_from_file_location("davda54_sam", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise MethodUnavailable(f"--davda54 {path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "SAM"):
        raise MethodUnavailable(f"--davda54 {path}: has no class SAM")
    return module.SAM


def sam_from_pytorch_optimizer() -> Any:
    """Return pytorch_optimizer's class SAM."""
    try:
        from pytorch_optimizer import SAM  # type: ignore[import-not-found]
    except ImportError as error:
        raise MethodUnavailable("pip install pytorch_optimizer") from error
    return SAM


class TorchLoop:
    """SAM in a dozen lines of torch, with the interface that other SAMs share."""

    def __init__(
        self, params: List[torch.nn.Parameter], base_optimizer: Any, rho: float, **adam: Any
    ) -> None:
        self.params, self.rho, self.base = params, rho, base_optimizer(params, **adam)

    @torch.no_grad()
    def first_step(self, zero_grad: bool) -> None:
        """Add ``rho g / ||g||``."""
        pairs = [(p, p.grad) for p in self.params if p.grad is not None]
        scale = self.rho / (torch.stack([grad.norm() for _, grad in pairs]).norm() + 1e-12)
        self.saved = [(p, p.clone()) for p, _ in pairs]
        for p, grad in pairs:
            p.add_(grad * scale)
        self.base.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool) -> None:
        """Restore the weights, then take the base optimizer's step."""
        for p, value in self.saved:
            p.copy_(value)
        self.base.step()
        self.base.zero_grad()


def build(name: str, setting: Setting, davda54: Optional[Path] = None, model: Any = None) -> Built:
    """Build a method.

    Args:
        davda54: sam.py of github.com/davda54/sam.
        model: to copy, see `build_trainer`.

    Raises:
        MethodUnavailable: it cannot run with this setting or installation.
    """
    with tempfile.TemporaryDirectory() as folder:
        if name in OTHER_SAMS:
            return build_other_sam(name, setting, Path(folder) / "data", davda54, model)
        if "adam-step" in OURS[name] and setting.precision.startswith("memory-efficient"):
            raise MethodUnavailable("weights that are not float32 take the loop")
        if name == TWO_FORWARDS and setting.update_freq > 1:
            raise MethodUnavailable("with several micro-batches delta-SAM itself has two forwards")
        argv = arguments(setting, Path(folder) / "data")
        trainer = build_trainer([*argv, *OURS[name].split()], model)
    trainer.reset_dummy_batch(random_batches(setting, 1)[0])
    update = with_clean_forward(trainer) if name == TWO_FORWARDS else trainer.train_step
    return Built(update, trainer, getattr(trainer.cfg.optimizer, "sam_every", 1))
