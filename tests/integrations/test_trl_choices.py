"""What the accuracy is, and what the curriculum draws from, is settled before anything is generated."""

import pytest
import torch
from datasets import Dataset
from transformers import Qwen3Config, Qwen3ForSequenceClassification

from expo_kernels import CurriculumTable
from expo_kernels.integrations.trl import ExpoGRPOTrainer
from tests.integrations.trl_runs import PLAIN, QUESTIONS, SIZES, compare, make_trainer, run, score

WITHOUT = 'train without accuracies: rho="constant", curriculum="uniform"'


def length(completion_ids, **_):
    """Numbers of tokens, which are no accuracies."""
    return [float(len(ids)) for ids in completion_ids]


@pytest.fixture
def no_model(monkeypatch):
    """Fails a test in which TRL begins to make its trainer, for which it loads the model first."""

    def fail(*_, **__):
        raise AssertionError("a model would have been loaded")

    monkeypatch.setattr("trl.trainer.grpo_trainer.create_model_from_path", fail)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"rho": "tan"}, "rho is 'tan'"),
        ({"curriculum": "hard"}, "expected \"gcs\", \"uniform\" or a CurriculumTable"),
        ({"curriculum": CurriculumTable(3)}, "curriculum has 3 questions, but train_dataset 8"),
        (
            {"train_dataset": Dataset.from_dict({"prompt": QUESTIONS}).to_iterable_dataset()},
            'an IterableDataset, but the curriculum draws questions by index: .* curriculum="uniform"',
        ),
        (
            {"train_dataset": None, "environment_factory": object},
            'the environment makes the questions.* curriculum="uniform"',
        ),
    ],
    ids=["rho", "kind", "size", "iterable", "environment"],
)  # fmt: skip
@pytest.mark.usefixtures("no_model")
def test_a_choice_that_cannot_be_is_refused_before_a_model_loads(tiny_model, extra, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(ExpoGRPOTrainer, tiny_model, extra=extra)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"reward_funcs": [length, score]}, f"there are 2 reward functions: .* accuracy_reward='length', or {WITHOUT}"),
        ({"accuracy_reward": "judge"}, "accuracy_reward='judge': no reward function has that name; they are 'score'"),
        (
            {"reward_funcs": [score, score], "accuracy_reward": "score"},
            "accuracy_reward='score': several reward functions have that name",
        ),
        (PLAIN | {"accuracy_reward": "score"}, "accuracy_reward='score' has no effect"),
    ],
    ids=["two", "unknown", "ambiguous", "ignored"],
)
def test_the_accuracy_is_chosen_at_construction(tiny_model, extra, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(ExpoGRPOTrainer, tiny_model, extra=extra)


def test_a_reward_model_gives_no_accuracies(tiny_model):
    judge = Qwen3ForSequenceClassification(Qwen3Config(vocab_size=64, num_labels=1, **SIZES))
    judge.config._name_or_path = "judges/small"
    extra = {"reward_funcs": [judge, score], "reward_processing_classes": [None, None]}
    extra["reward_processing_classes"][0] = make_trainer(ExpoGRPOTrainer, tiny_model).processing_class
    with pytest.raises(ValueError, match=f"the scores of the reward model 'small' are logits.* or {WITHOUT}"):
        make_trainer(ExpoGRPOTrainer, tiny_model, extra=extra | {"accuracy_reward": "small"})
    make_trainer(ExpoGRPOTrainer, tiny_model, extra=extra | {"accuracy_reward": "score"})


def test_a_batch_of_more_questions_than_there_are_is_refused(tiny_model):
    with pytest.raises(ValueError, match="a generation batch draws 9 questions, but train_dataset has 8"):
        make_trainer(ExpoGRPOTrainer, tiny_model, gradient_accumulation_steps=9)


def test_the_accuracy_may_have_no_part_in_the_reward(tiny_model):
    extra = {"reward_funcs": [length, score], "accuracy_reward": "score"}
    first = run(make_trainer(ExpoGRPOTrainer, tiny_model, extra=extra, reward_weights=[1.0, 0.0])).history[0]
    assert first["accuracy"] == pytest.approx(first["rewards/score/mean"])
    assert first["reward"] == pytest.approx(first["rewards/length/mean"])


def test_plain_grpo_takes_any_rewards_and_any_data_set(tiny_model):
    data = Dataset.from_dict({"prompt": QUESTIONS}).to_iterable_dataset()
    ours = compare(tiny_model, extra={"reward_funcs": [length, score], "train_dataset": data}, beta=0.02)
    assert "accuracy" not in ours.history[0]


def test_an_iterable_data_set_goes_with_a_scaled_penalty(tiny_model):
    data = Dataset.from_dict({"prompt": QUESTIONS}).to_iterable_dataset()
    extra = {"train_dataset": data, "curriculum": "uniform"}
    first = run(make_trainer(ExpoGRPOTrainer, tiny_model, extra=extra, beta=0.02)).history[0]
    assert first["beta_eff"] == pytest.approx(0.01 * (1 + torch.tanh(torch.tensor(first["accuracy"])).item()))


def test_a_penalty_of_0_that_rho_cannot_scale_is_reported(tiny_model):
    with pytest.warns(UserWarning, match=r"beta is 0\.0.*rho has nothing to scale"):
        make_trainer(ExpoGRPOTrainer, tiny_model, extra={"curriculum": "uniform"})


@pytest.mark.parametrize(
    ("extra", "is_refused"),
    [
        ({}, True),
        ({"curriculum": "uniform"}, True),
        ({"rho": "constant"}, True),
        (PLAIN, False),
    ],
    ids=["expo", "uniform", "constant", "plain"],
)
@pytest.mark.parametrize("values", [(-9.0, 10.0), (0.5, 1.5)])  # the mean of the first pair is an accuracy
def test_scores_that_are_no_accuracies_are_refused_where_they_are_read(tiny_model, extra, is_refused, values):
    def graded(completion_ids, **_):
        return [values[index % 2] for index, _ in enumerate(completion_ids)]

    trainer = make_trainer(ExpoGRPOTrainer, tiny_model, extra=extra | {"reward_funcs": graded}, max_steps=1)
    if is_refused:
        with pytest.raises(ValueError, match=rf"function 'graded' gave the score .* accuracies in \[0, 1\].*{WITHOUT}"):
            trainer.train()
        assert trainer.state.global_step == 0
    else:
        assert "accuracy" not in run(trainer).history[0]
