"""A model that was read from a checkpoint is evaluated by the layers that it was trained with."""

import torch

from deltasam_fairseq.trainer.perturbed_weights import PerturbedWeights
from tests.helpers import tiny


def test_evaluation_is_training_without_dropout(translation, tmp_path):
    """fairseq 0.12 alone, with torch 2: RuntimeError, Mask Type should be defined."""
    more = ["--dropout", "0", "--attention-dropout", "0"]
    argv = tiny.arguments(translation, tmp_path, *more, criterion="cross_entropy")
    trainer = tiny.build_trainer(argv)
    model, sample = trainer.get_model(), tiny.batches(trainer)[0]
    model.load_state_dict(model.state_dict())
    assert sample["net_input"]["src_tokens"].eq(1).any()
    real, outputs = sample["target"].ne(1), []
    for training in (False, True):  # once it trained, 0.12 never uses its fused layers again
        model.train(training)
        with torch.no_grad():
            outputs.append(model(**sample["net_input"])[0][real])
    torch.testing.assert_close(outputs[0], outputs[1])


def test_copies_of_weights_are_not_perturbed(classification, tmp_path):
    """fairseq 0.12 makes new ones on reading: a resumed run would take another step."""
    argv = tiny.arguments(classification, tmp_path, "--optimizer", "delta_sam_adam")
    model = tiny.build_trainer(argv).get_model()
    before = PerturbedWeights([model], None).parameters()
    layer = model.encoder.sentence_encoder.layers[0]
    layer.register_parameter("in_proj_weight", torch.nn.Parameter(torch.zeros(3)))
    layer.register_parameter("own", torch.nn.Parameter(torch.zeros(3)))
    after = {id(p) for p in PerturbedWeights([model], None).parameters()}
    assert after == {id(p) for p in before} | {id(layer.own)}
