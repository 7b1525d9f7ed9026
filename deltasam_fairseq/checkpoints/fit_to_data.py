"""Compare the data of a checkpoint with that of a run: map what can be mapped, or refuse.

    state = checkpoint_utils.load_checkpoint_to_cpu(path)
    fit_to_data(state, DataRecord.of_folder(data), f"--path {path}")

Labels in another order and scores on another scale are mapped: in ``state`` the rows of the
classification head are permuted or multiplied, and the log says so. Everything else that differs is
refused. docs/checkpoints.md has the table.
"""

import dataclasses
import logging
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

from fairseq import checkpoint_utils, utils
from fairseq.dataclass.utils import overwrite_args_by_name

from deltasam_fairseq.checkpoints.data_record import KEY, DataRecord

logger = logging.getLogger(__name__)

_HEADS = "classification_heads."


class DataMismatchError(ValueError):
    """A checkpoint was trained on other data; the message names both sides and the remedy."""


class Difference(NamedTuple):
    """One thing in which two data sets differ, in words for an error.

    Attributes:
        kind: ``words``, ``targets``, ``labels``, ``scale``, ``sentences``, ``columns``,
            ``languages``, ``tokens`` or ``preparation``.
        trained: what the checkpoint was trained on or with.
        here: what the data is or has.
        remedy: what to do.
    """

    kind: str
    trained: str
    here: str
    remedy: str

    def __str__(self) -> str:
        return f"trained {self.trained}, the data {self.here}; {self.remedy}"


def differences(trained: DataRecord, data: DataRecord) -> List[Difference]:
    """Compare the data that a model was trained on with other data.

    Only what is known of both counts. Labels in another order and another scale are not among
    them, as they can be mapped: see `class_order` and `score_factor`.
    """
    found = []
    for side in sorted(trained.words.keys() & data.words.keys()):
        there, here = trained.words[side], data.words[side]
        if not there.same(here):
            remedy = "prepare the data with the dict.txt that the checkpoint was trained with"
            what = f"with a dictionary ({side}) of {there.shown(here)}"
            found.append(Difference("words", what, f"has {here.shown(there)}", remedy))
    found += _target_differences(trained, data)
    if None not in (trained.sentences, data.sentences) and trained.sentences != data.sentences:
        remedy = "give data whose examples have as many sentences"
        what = f"on examples of {_count(trained.sentences)}"
        found.append(Difference("sentences", what, f"has {_count(data.sentences)}", remedy))
    elif _swapped(trained, data):
        remedy = "prepare it with the columns in that order"
        names = (" ".join(map(repr, r.columns or ())) for r in (trained, data))
        what = f"on the columns {next(names)} in this order"
        found.append(Difference("columns", what, f"has {next(names)}", remedy))
    if trained.languages and trained.languages[::-1] == data.languages != trained.languages:
        ways = [" into ".join(r.languages or ()) for r in (trained, data)]
        remedy = "give a model of that direction"
        found.append(Difference("languages", f"for {ways[0]}", f"is for {ways[1]}", remedy))
    if trained.tokens is not None and data.tokens is not None:
        used = 1 if 1 in (trained.sentences, data.sentences) else 2  # one needs no separator
        tokens = trained.tokens[:used], data.tokens[:used]
        if tokens[0] != tokens[1]:
            remedy = "use the same tokens with both"
            what = f"with {_tokens(tokens[0])}"
            found.append(Difference("tokens", what, f"comes with {_tokens(tokens[1])}", remedy))
    return found


def require_same_tokens(records: Sequence[DataRecord], names: Sequence[str]) -> None:
    """Raise a DataMismatchError if models of one ensemble were trained with different tokens."""
    for record, name in zip(records, names):
        other = DataRecord(sentences=records[0].sentences, tokens=records[0].tokens)
        for difference in differences(record, other):
            raise DataMismatchError(
                f"{name}: trained with {_tokens(record.tokens or ())}, {names[0]} with "
                f"{_tokens(records[0].tokens or ())}; {difference.remedy}"
            )


def _target_differences(trained: DataRecord, data: DataRecord) -> List[Difference]:
    if None not in (trained.regression, data.regression):
        if trained.regression != data.regression:
            some, others = (_targets(record) for record in (trained, data))
            remedy = "give data with the checkpoint's kind of targets"
            return [Difference("targets", f"for {some}", f"has {others}", remedy)]
    if trained.labels is not None and data.labels is not None:
        if trained.classes is not None and len(data.labels) > trained.classes:
            some, others = (_targets(record) for record in (trained, data))
            remedy = "give data of no more labels"
            return [Difference("targets", f"for {some}", f"has {others}", remedy)]
        if class_order(trained, data) is None:
            some, others = (" ".join(map(str, r.labels or ())) for r in (trained, data))
            remedy = (
                "what a class of the model means cannot be known; if they mean the same, give "
                "them the same names in the data's label/dict.txt"
            )
            return [Difference("labels", f"with the labels {some}", f"has {others}", remedy)]
    return []


def preparation_differences(trained: DataRecord, data: DataRecord) -> List[Difference]:
    """Compare what a text goes through before it is data: BPE, separators."""
    found = []
    for name, text in (("encoding", "bpe or dict.txt"), ("separators", "number of separators")):
        some, others = getattr(trained, name), getattr(data, name)
        if None not in (some, others) and some != others:
            made = f"on data of another {text}", f"was made with {_made(others, some)}"
            remedy = "prepare it with what the checkpoint's own data was made with"
            found.append(Difference("preparation", *made, remedy))
    return found


def class_order(trained: DataRecord, data: DataRecord) -> Optional[List[int]]:
    """Find out which output of the model is which class of the data.

    Args:
        trained: with labels.
        data: with labels; those that the model lacks are taken for its outputs without a name.

    Returns:
        for every class of the data, and then for outputs without one: the number of the model's
        output; None if the names do not tell.
    """
    there, here = trained.labels or [], data.labels or []
    outputs = max(trained.classes or 0, len(there))
    nameless = list(range(len(there), outputs))
    if not (set(here) <= set(there) or (set(there) <= set(here) and len(here) <= outputs)):
        return None
    order = [there.index(name) if name in there else nameless.pop(0) for name in here]
    return order + [i for i in range(outputs) if i not in order]


def score_factor(trained: DataRecord, data: DataRecord) -> float:
    """Return what the model's scores have to be multiplied by to be on the data's scale."""
    if not (trained.regression and trained.scale and data.scale):
        return 1.0
    return trained.scale / data.scale


def _swapped(trained: DataRecord, data: DataRecord) -> bool:
    """Whether the same columns were read in another order.

    Numbers of columns say it only of the same task: another file may have them elsewhere.
    """
    some, others = trained.columns or [], data.columns or []
    if some == others or sorted(some) != sorted(others):
        return False
    return trained.task == data.task or not all(name.startswith("column ") for name in some)


def _made(here: Any, there: Any) -> str:
    """Say how data was encoded, beside how other data was."""
    if not isinstance(here, list):
        return f"{here}, not {there}"
    some, others = (f"{v[0]} --wordpiece-cased" if v[2] else str(v[0]) for v in (here, there))
    return f"{some}, not {others}" if some != others else f"{some} and other files"


def _count(sentences: Optional[int]) -> str:
    return "1 sentence" if sentences == 1 else f"{sentences} sentences"


def _targets(record: DataRecord) -> str:
    if record.regression:
        return "scores"
    classes = record.classes or (None if record.labels is None else len(record.labels))
    return "classes" if classes is None else f"{classes} classes"


def _tokens(tokens: Sequence[Optional[int]]) -> str:
    pairs = zip(("--init-token", "--separator-token"), tokens)
    return " and ".join(f"no {o}" if token is None else f"{o} {token}" for o, token in pairs)


class Loaded(NamedTuple):
    """A model and what it was trained with; ``criterion``: the criterion's state, if it has any."""

    model: Any
    cfg: Any
    task: Any
    record: DataRecord
    criterion: Any


def fit_to_data(
    state: Dict[str, Any],
    data: DataRecord,
    name: str,
    head: Optional[str] = None,
    rescales: bool = True,
    same_preparation: bool = False,
) -> DataRecord:
    """Make a checkpoint's outputs mean what the data's targets mean, or refuse.

    Args:
        state: as `load_checkpoint_to_cpu` gives it, its ``data`` not overridden; the classification
            head's rows are replaced in it, and its record is brought up to date.
        data: of the folder, or of the task, that the model is to be used with.
        name: of the checkpoint, for the log and the errors, such as ``--path FILE``.
        head: the classification head that is used; default: the one that was trained.
        rescales: whether scores on another scale may be mapped; else they are refused.
        same_preparation: whether task, BPE and separators must be the same too; else the log warns
            of another BPE or number of separators.

    Returns:
        what the checkpoint says of its data, after the mapping.

    Raises:
        DataMismatchError: they differ in something that cannot be mapped.
    """
    trained = _of_head(DataRecord.of_checkpoint(state), head)
    if not trained.known:
        logger.warning(
            f"{name}: the data that it was trained on is not recorded in it and not here, so its "
            "labels, words and sentences cannot be compared"
        )
    found, prepared = differences(trained, data), preparation_differences(trained, data)
    if same_preparation:
        if None not in (trained.task, data.task) and trained.task != data.task:
            made = f"on {trained.task}", f"is {data.task}"
            prepared.insert(0, Difference("preparation", *made, "give data of the same task"))
        found = prepared + found
    else:
        _warn_of(prepared, name, trained, "it is used all the same")
    factor = score_factor(trained, data)
    if factor != 1 and not (rescales and _can_rescale(state, trained)):
        some, others = (f"scores divided by {r.scale:g}" for r in (trained, data))
        remedy = f"prepare the data with the scale {trained.scale:g}"
        found.append(Difference("scale", f"on {some}", f"has {others}", remedy))
    if found:
        where = f" (by {trained.origin})" if trained.known else ""
        raise DataMismatchError(f"{name}{where}: " + "; ".join(map(str, found)))
    return _map_head(state, trained, data, name)


def load_on_data(
    path: str,
    data: str,
    name: str,
    overrides: Optional[Dict[str, Any]] = None,
    check: Optional[Callable[[Dict[str, Any]], None]] = None,
    **options: Any,
) -> Loaded:
    """Load a checkpoint to be used on a data folder: `fit_to_data`, then fairseq's own loading.

    Args:
        path: of the checkpoint.
        data: the folder.
        name: see `fit_to_data`.
        overrides: options of the checkpoint to replace, besides ``data``.
        check: called with what is in the file, before anything else.
        options: of `fit_to_data`.

    Raises:
        DataMismatchError: it was trained on other data.
        CheckpointDamagedError, CheckpointRefusedError: it cannot be read.
    """
    state = checkpoint_utils.load_checkpoint_to_cpu(path)
    if check is not None:
        check(state)
    folder = utils.split_paths(data)[0]
    record = fit_to_data(state, DataRecord.of_folder(folder), name, **options)
    replaced = {"data": data, **(overrides or {})}
    if state.get("args") is not None:
        vars(state["args"]).update(replaced)
    if state.get("cfg") is not None:
        overwrite_args_by_name(state["cfg"], replaced)
    (model,), cfg, task = checkpoint_utils.load_model_ensemble_and_task([path], state=state)
    return Loaded(model, cfg, task, record, state.get("criterion"))


def fit_start(state: Dict[str, Any], data: DataRecord, name: str, resumes: bool) -> None:
    """The same for a checkpoint that training starts from: only what training cannot repair stops.

    Words are refused if a classification head is taken over; labels in another order are refused if
    the optimizer's state goes on. Everything else that differs is logged.

    Args:
        state, name: see `fit_to_data`.
        data: of the task to train.
        resumes: whether the optimizer's state is taken over too.

    Raises:
        DataMismatchError: see above.
    """
    trained = DataRecord.of_checkpoint(state)
    rows = _outputs(state, data.head)
    takes_head = rows is not None and rows == data.classes
    if not takes_head:
        of_body = ("words", "encoding", "separators", "origin")
        trained = DataRecord(**{name: getattr(trained, name) for name in of_body})
    elif not trained.known:
        logger.warning(
            f"{name}: the data of its classification head {data.head} is not recorded in it and "
            "not here; what its outputs mean cannot be compared"
        )
    found = differences(trained, data)
    for difference in found:
        if takes_head and difference.kind == "words":
            raise DataMismatchError(f"{name} (by {trained.origin}): {difference}")
    found_all = preparation_differences(trained, data) + found
    _warn_of(found_all, name, trained, "training goes on from it")
    if not takes_head or any(difference.kind in ("labels", "targets") for difference in found):
        return
    if resumes and (_reordered(trained, data) or score_factor(trained, data) != 1):
        raise DataMismatchError(
            f"{name}: trained with {_meaning(trained)}, the data has {_meaning(data)}, and the "
            "optimizer's state goes with the former; prepare the data as before, or give "
            "--reset-optimizer or --finetune-from-model"
        )
    if _can_rescale(state, trained):
        _map_head(state, trained, data, name)


def _warn_of(found: Sequence[Difference], name: str, trained: DataRecord, ends: str) -> None:
    for difference in found:
        logger.warning(f"{name} (by {trained.origin}): {difference}; {ends}")


def _of_head(trained: DataRecord, head: Optional[str]) -> DataRecord:
    """The same without what is said of another head's outputs."""
    if head is None or trained.head in (None, head):
        return trained
    return dataclasses.replace(
        trained, labels=None, classes=None, regression=None, scale=None, head=head
    )


def _reordered(trained: DataRecord, data: DataRecord) -> Optional[List[int]]:
    """Return `class_order` if it is not the order that there is."""
    if trained.labels is None or data.labels is None:
        return None
    order = class_order(trained, data)
    return order if order is not None and order != list(range(len(order))) else None


def _outputs(state: Dict[str, Any], head: Optional[str]) -> Optional[int]:
    bias = state["model"].get(f"{_HEADS}{head}.out_proj.bias")
    return None if bias is None else len(bias)


def _can_rescale(state: Dict[str, Any], trained: DataRecord) -> bool:
    """Whether the head's scale is in its weights: not with spectral normalisation."""
    return f"{_HEADS}{trained.head}.out_proj.weight_orig" not in state["model"]


def _meaning(record: DataRecord) -> str:
    if record.regression:
        return f"scores divided by {record.scale:g}"
    return f"the labels {' '.join(record.labels or ())}"


def _map_head(
    state: Dict[str, Any], trained: DataRecord, data: DataRecord, name: str
) -> DataRecord:
    order, factor = _reordered(trained, data), score_factor(trained, data)
    if order is None and factor == 1:
        return trained
    extra = state.setdefault("extra_state", {})
    prefix = f"{_HEADS}{trained.head}.out_proj."
    for weights in (state["model"], extra.get("ema") or {}, extra.get("ema_fp32_params") or {}):
        for key in [k for k in weights if k.startswith(prefix) and not k.endswith("_v")]:
            weights[key] = weights[key] * factor if order is None else weights[key][order]
    logger.warning(
        f"{name}: trained with {_meaning(trained)}, the data has {_meaning(data)}: its outputs are "
        + (f"permuted to {order}" if order is not None else f"multiplied by {factor:g}")
    )
    labels = trained.labels
    if order is not None and labels is not None and data.labels is not None:
        more = [labels[i] for i in order[len(data.labels) :] if i < len(labels)]
        labels = data.labels + more  # of the outputs, in their new order
    scale = trained.scale if factor == 1 else data.scale
    mapped = dataclasses.replace(trained, labels=labels, scale=scale)
    extra[KEY] = mapped.plain()
    return mapped
