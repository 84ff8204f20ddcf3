import torch

from expo_kernels import ExpoLoss, LinearExpoLoss, Objective, __main__, expo_loss, linear_expo_loss
from tests.numerics import make_batch


def test_modules_are_their_functions():
    batch = make_batch(dtype=torch.float32)
    objective = Objective(clip_high=0.28, aggregation="token")
    inputs = batch.loss_inputs(objective)
    where = (batch.completion_ids, batch.completion_mask)
    made = ExpoLoss(objective)(batch.logits, *where, **inputs)
    assert torch.equal(made.loss, expo_loss(batch.logits, *where, objective=objective, **inputs).loss)
    head = (batch.hidden, batch.weight)
    made = LinearExpoLoss(objective)(*head, *where, bias=batch.bias, **inputs)
    function = linear_expo_loss(*head, *where, bias=batch.bias, objective=objective, **inputs)
    assert torch.equal(made.loss, function.loss)


def test_a_module_shows_its_objective_and_holds_no_state():
    module = LinearExpoLoss(Objective(clip_high=0.28))
    assert "clip_high=0.28" in repr(module)
    assert not module.state_dict()
    assert ExpoLoss().objective == Objective()


def test_the_self_check_passes_here_and_fails_where_an_op_is_off(monkeypatch, capsys):
    assert __main__.main() == 0
    assert "OFF" not in capsys.readouterr().out
    right = __main__.linear_token_logps
    monkeypatch.setattr(__main__, "linear_token_logps", lambda *args, **options: right(*args, **options) + 1e-4)
    assert __main__.main() == 1
    assert capsys.readouterr().out.count("OFF  linear_token_logps") == 3
