"""Tiny fairseq runs for tests: data, command lines, trainers in this process."""

import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

import numpy as np
import torch
from fairseq import options, tasks
from fairseq.data import Dictionary, indexed_dataset
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.logging import metrics

import deltasam_fairseq
from tests.helpers.processes import run_module

USER_DIR = os.path.dirname(os.path.abspath(deltasam_fairseq.__file__))
WORDS = 20

# A RoBERTa of 2 layers and 9 thousand weights.
MODEL = (
    "--arch roberta_base --encoder-layers 2 --encoder-embed-dim 16 --encoder-ffn-embed-dim 32 "
    "--encoder-attention-heads 2 --max-positions 64"
).split()


SENTENCE_CRITERIONS = (
    *("sentence_prediction", "plain", "r3f", "r_drop", "freelb", "smart", "vat", "distill"),
)

CONTRASTIVE = ("nt_xent", "nt_xent_r3f")

# What a criterion cannot do without; the file is made by `write_teacher`.
TEACHER = "teacher.pt"
WITH_TEACHER = ("distill", "seq2seq_distill")


def _write(prefix: Path, rows: Sequence[Sequence[int]]) -> None:
    prefix.parent.mkdir(parents=True, exist_ok=True)
    builder = indexed_dataset.MMapIndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for row in rows:
        builder.add_item(torch.tensor(list(row), dtype=torch.int32))
    builder.finalize(f"{prefix}.idx")


def dictionary() -> Dictionary:
    words = Dictionary()
    for i in range(WORDS):
        words.add_symbol(f"w{i}")
    return words


def sentences(n: int, seed: int, longest: int = 10) -> List[List[int]]:
    """``n`` sentences of 3 to ``longest`` words as dictionary indices, without end mark."""
    rng = np.random.RandomState(seed)
    return [(4 + rng.randint(0, WORDS, rng.randint(3, longest + 1))).tolist() for _ in range(n)]


def write_classification(
    path: Path,
    train: int = 32,
    valid: int = 16,
    longest: int = 10,
    names: Sequence[str] = ("0", "1"),
) -> Path:
    """sentence_prediction data: does the sentence hold more low words than high ones?"""
    words, labels = dictionary(), Dictionary()
    for label in names:
        labels.add_symbol(label)
    for split, n, seed in (("train", train, 1), ("valid", valid, 2)):
        rows = sentences(n, seed, longest)
        _write(path / "input0" / split, [row + [words.eos()] for row in rows])
        targets = [int(np.mean(row) < 4 + WORDS / 2) for row in rows]
        _write(
            path / "label" / split,
            [[labels.index(names[t]), labels.eos()] for t in targets],
        )
        scores = "".join(f"{np.mean(row) / WORDS}\n" for row in rows)
        (path / "label" / f"{split}.label").write_text(scores)
    words.save(str(path / "input0" / "dict.txt"))
    labels.save(str(path / "label" / "dict.txt"))
    return path


def write_language_modelling(path: Path, train: int = 32, valid: int = 16) -> Path:
    """masked_lm and language_modeling data."""
    words = dictionary()
    for split, n, seed in (("train", train, 1), ("valid", valid, 2)):
        _write(path / split, [row + [words.eos()] for row in sentences(n, seed)])
    words.save(str(path / "dict.txt"))
    return path


def write_translation(path: Path, train: int = 32, valid: int = 16) -> Path:
    """translation data aa -> bb: the target is the source reversed."""
    words = dictionary()
    for split, n, seed in (("train", train, 1), ("valid", valid, 2)):
        rows = sentences(n, seed)
        _write(path / f"{split}.aa-bb.aa", [row + [words.eos()] for row in rows])
        _write(path / f"{split}.aa-bb.bb", [row[::-1] + [words.eos()] for row in rows])
    for lang in ("aa", "bb"):
        words.save(str(path / f"dict.{lang}.txt"))
    return path


def write_ranking(path: Path, train: int = 32, valid: int = 16) -> Path:
    """sentence_ranking data: which of two sentences has the lower words?"""
    words = dictionary()
    for split, n, seed in (("train", train, 1), ("valid", valid, 2)):
        pairs = list(zip(sentences(n, seed), sentences(n, seed + 10)))
        for k in (1, 2):
            _write(path / f"input{k}" / split, [pair[k - 1] + [words.eos()] for pair in pairs])
        _write(path / "input0" / split, [[words.bos(), words.eos()] for _ in pairs])
        labels = "".join(f"{int(np.mean(a) > np.mean(b))}\n" for a, b in pairs)
        (path / "label").mkdir(exist_ok=True)
        (path / "label" / f"{split}.label").write_text(labels)
    for k in (0, 1, 2):
        words.save(str(path / f"input{k}" / "dict.txt"))
    return path


def write_span_prediction(
    path: Path, train: int = 24, valid: int = 14, seen_in_validation: bool = False
) -> Path:
    """span_prediction data of SQuAD 2.0's kind, in windows of at most 16 tokens.

    A question is a word, its answer the next one or two words of the context; every fifth word is
    not in the context.
    """
    from deltasam_fairseq.squad.questions import COLUMNS
    from deltasam_fairseq.squad.windows import Layout

    words, layout = dictionary(), Layout(length=16, stride=4, query=4, separators=2)
    path.mkdir(parents=True, exist_ok=True)
    record: Dict[str, Any] = {"task": "span_prediction", "max_seq_length": 16, "splits": {}}
    for split, n, seed in (("train", train, 1), ("valid", valid, 1 if seen_in_validation else 2)):
        rng = np.random.RandomState(seed)
        tokens, rows, offsets, contexts, questions = [], [], [], [], []
        for i in range(n):
            context = 4 + rng.permutation(WORDS)[: rng.randint(6, 15)]
            names = [words[token] for token in context]
            ends = np.cumsum([len(name) + 1 for name in names]) - 1
            spans = [(end - len(name), end) for name, end in zip(names, ends)]
            at, answer, golds = rng.randint(len(context) - 2), None, []
            asked = context[at]
            if i % 5 == 4:
                asked = next(t for t in range(4, 4 + WORDS) if t not in context)
            else:
                answer = (at + 1, at + 1 + i % 2)
                golds = [" ".join(names[answer[0] : answer[1] + 1])]
            windows = layout.windows(np.array([asked]), context, answer, words.bos(), words.eos())
            tokens += [window.tokens for window in windows]
            for window in windows:
                rows.append([i if c == "question" else getattr(window, c) for c in COLUMNS])
            offsets.append(np.array(spans).reshape(-1))
            contexts.append(" ".join(names))
            questions.append([f"q{i}", i, golds])
        _write(path / split, tokens)
        _write(path / f"{split}.offsets", offsets)
        np.save(path / f"{split}.windows.npy", np.array(rows, dtype=np.int32))
        content = {"version_2": True, "contexts": contexts, "questions": questions}
        (path / f"{split}.json").write_text(json.dumps(content))
        record["splits"][split] = {"questions": n, "version_2": True, "labelled": True}
    (path / "task.json").write_text(json.dumps(record))
    words.save(str(path / "dict.txt"))
    return path


def write_sentences(path: Path, train: int = 32, valid: int = 12) -> Path:
    """sentence_embedding data: sentences of 9 to 16 words; pairs, scored by the words in common."""
    words = dictionary()
    names = [words[i] for i in range(words.nspecial, len(words))]
    path.mkdir(parents=True, exist_ok=True)
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *names]
    (path / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces))
    words.save(str(path / "dict.txt"))
    rng = np.random.RandomState(1)

    def sentence() -> List[str]:
        return list(rng.choice(names, rng.randint(9, 17)))

    (path / "train.txt").write_text("".join(f"{' '.join(sentence())}\n" for _ in range(train)))
    pairs = [(sentence(), sentence()) for _ in range(valid)]
    rows = (f"{len({*a} & {*b})}\t{' '.join(a)}\t{' '.join(b)}\n" for a, b in pairs)
    (path / "valid.tsv").write_text("".join(rows))
    bpe = {"name": "wordpiece", "options": {"wordpiece_vocab": "vocab.txt"}}
    (path / "task.json").write_text(json.dumps({"task": "sentence_embedding", "bpe": bpe}))
    return path


def arguments(
    data: Path, save_dir: Path, *more: str, criterion: str = "sentence_prediction"
) -> List[str]:
    """Command line of a short run; ``more`` comes last and wins."""
    sentence_prediction = ["--task", "sentence_prediction", *MODEL, "--num-classes", "2"]
    sentence_prediction += ["--init-token", "0", "--separator-token", "2"]
    task = {
        **dict.fromkeys(SENTENCE_CRITERIONS, sentence_prediction),
        "sentence_ranking": ["--task", "sentence_ranking", *MODEL, "--num-classes", "2"]
        + ["--init-token", "0", "--separator-token", "2"],
        "span_prediction": ["--task", "span_prediction", *MODEL],
        **dict.fromkeys(CONTRASTIVE, ["--task", "sentence_embedding", *MODEL]),
        "masked_lm": ["--task", "masked_lm", *MODEL, "--sample-break-mode", "complete"]
        + ["--tokens-per-sample", "24"],
    }.get(criterion)
    if task is None:
        task = "--task translation -s aa -t bb --arch transformer_iwslt_de_en".split()
        task += "--encoder-layers 1 --decoder-layers 1".split()
        for side in ("encoder", "decoder"):
            task += f"--{side}-embed-dim 16 --{side}-ffn-embed-dim 32".split()
            task += f"--{side}-attention-heads 2".split()
    if criterion in WITH_TEACHER:
        more = ("--distill-teacher", str(data / TEACHER), *more)
    return [
        str(data),
        *task,
        *("--criterion", criterion, "--optimizer", "adam", "--lr", "1e-3"),
        *("--batch-size", "8", "--max-update", "6", "--max-epoch", "10", "--seed", "3"),
        *("--save-dir", str(save_dir), "--log-format", "json", "--log-interval", "1"),
        *("--cpu", "--num-workers", "0", "--no-progress-bar", "--user-dir", USER_DIR),
        *more,
    ]


def train(
    argv: Sequence[str],
    check: bool = True,
    program: Optional[Sequence[str]] = None,
    env: Optional[Dict[str, str]] = None,
    cwd: Optional[Path] = None,
) -> "subprocess.CompletedProcess[str]":
    """Run fairseq-train, or a whole command line in its place, in a process of its own."""
    command = [*(program or ["fairseq_cli.train"]), *map(str, argv)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    if program is None:
        with tempfile.TemporaryDirectory() as folder:
            result = run_module("fairseq_cli.train", argv, Path(folder), environment, cwd)
    else:
        result = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            universal_newlines=True,
            env=environment,
            cwd=cwd,
        )
    if check and result.returncode:
        raise AssertionError(f"{' '.join(command)}\n{result.stdout}")
    return result


def build_trainer(
    argv: Sequence[str],
    dtype: Optional[torch.dtype] = None,
    before: Optional[Callable[[Any], Any]] = None,
) -> Any:
    """A trainer in this process, as fairseq's main builds it, with its data loaded.

    ``before`` is called with the configuration, before anything is built.
    """
    import fairseq_cli.train

    parser = options.get_training_parser()
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, list(argv)))
    if before is not None:
        before(cfg)
    metrics.reset()
    torch.manual_seed(cfg.common.seed)
    np.random.seed(cfg.common.seed)
    task = tasks.setup_task(cfg.task)
    model, criterion = task.build_model(cfg.model), task.build_criterion(cfg.criterion)
    if dtype is not None:
        model, criterion = model.to(dtype), criterion.to(dtype)
    trainer = fairseq_cli.train.Trainer(cfg, task, model, criterion)
    if dtype == torch.float64:  # fairseq's norm for the log narrows to float32, which torch refuses
        trainer.clip_grad_norm = lambda _: torch.ones(())
    task.load_dataset("train")
    return trainer


def write_teacher(data: Path, criterion: str, *more: str, name: str = TEACHER) -> Path:
    """A checkpoint in the data's folder, of another depth and width than the tiny student.

    Its weights are far from their start, so that it is sure of what it says.
    """
    other = "--encoder-layers 3 --encoder-embed-dim 24 --encoder-ffn-embed-dim 40".split()
    if not criterion.startswith("sentence"):
        other += "--decoder-layers 2 --decoder-embed-dim 24".split()
    trainer = build_trainer(arguments(data, data, *other, *more, criterion=criterion))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in trainer.get_model().parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    trainer.consolidate_optimizer()  # as fairseq does it before it saves
    trainer.save_checkpoint(str(data / name), {"train_iterator": {}})
    return data / name


def batches(trainer: Any, size: Optional[int] = None) -> List[Dict[str, Any]]:
    """All batches of the training set, in order."""
    dataset = trainer.task.dataset("train")
    size = size or trainer.cfg.dataset.batch_size
    order = range(len(dataset))
    found = [
        dataset.collater([dataset[i] for i in order[at : at + size]])
        for at in range(0, len(dataset), size)
    ]
    trainer.reset_dummy_batch(found[0])
    return found


def weights(trainer: Any) -> List[torch.Tensor]:
    return [p.data.clone() for p in trainer.get_model().parameters()]


def checkpoint_weights(path: Path) -> Dict[str, torch.Tensor]:
    from fairseq import checkpoint_utils

    return checkpoint_utils.load_checkpoint_to_cpu(str(path))["model"]


def without_fused(state: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """All but the fused copies of fairseq 0.12.2, which it does not train but makes on loading."""
    fused = re.compile(r"layers\.\d+\.(in_proj|out_proj|fc\d)_(weight|bias)$")
    return {name: tensor for name, tensor in state.items() if not fused.search(name)}
