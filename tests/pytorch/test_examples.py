"""The example loops on a tiny BERT that Hugging Face's library makes here."""

from pathlib import Path

import pytest
import torch

from tests.helpers import processes

transformers = pytest.importorskip("transformers")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "a"]


def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=len(WORDS), intermediate_size=16, **sizes)
    return transformers.BertForSequenceClassification(config)


def rows(n=8):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, len(WORDS), (n, 4), generator=generator)
    return [{"input_ids": each, "labels": torch.tensor(int(each[0] == 5))} for each in ids]


def moved(model):
    return any(not torch.equal(*both) for both in zip(model.parameters(), bert().parameters()))


def test_the_trainer_subclass(tmp_path):
    pytest.importorskip("accelerate")
    from examples.pytorch.hf_trainer import SharpnessAwareTrainer

    model = bert()
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, use_cpu=True, report_to=[],
        gradient_accumulation_steps=2, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = SharpnessAwareTrainer(model, arguments, train_dataset=rows())
    found = trainer.train()
    assert found.global_step == 2 and trainer.sam.update == 4 and moved(model)
    assert 0 < found.training_loss < 2 and trainer.sam.figures()["sharpness"] > 0


def test_the_accelerate_loop():
    pytest.importorskip("accelerate")
    from examples.pytorch.accelerate_loop import train

    model = bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0)
    figures = train(model, optimizer, scheduler, torch.utils.data.DataLoader(rows(), batch_size=4))
    assert figures["sharpness"] > 0 and moved(model)


def test_sst2_on_two_processes(tmp_path):
    """The script under 60 lines; the table has a line a method."""
    script = Path(__file__).parents[2] / "examples/pytorch/sst2.py"
    assert len(script.read_text().splitlines()) < 60
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    bert().save_pretrained(tmp_path)
    lines = "sentence\tlabel\na good film\t1\na bad film\t0\n"
    for split in ("train", "dev"):
        (tmp_path / f"{split}.tsv").write_text(lines)
    port = str(processes.free_port())
    outputs, started = [tmp_path / f"{rank}.log" for rank in range(2)], []
    for rank, output in enumerate(outputs):
        env = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        argv = [tmp_path, tmp_path, 2]
        env = {**env, "MASTER_PORT": port}
        started.append(processes.fork("examples.pytorch.sst2", argv, output, env=env))
    for process, output in zip(started, outputs):
        process.join(100)
        assert process.exitcode == 0, output.read_text()
    table = [line for line in outputs[0].read_text().splitlines() if line.startswith("|")]
    assert [line.split()[1] for line in table[2:]] == ["Adam", "SAM", "delta-SAM"], table
