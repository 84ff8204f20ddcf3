"""A rollout engine with weights of its own that can be staged, as those of vLLM's servers can; it needs no vLLM."""

import itertools

from expo.rollout.transformers import TransformersEngine


class StagingEngine(TransformersEngine):
    """Keeps staged weights by name, as weight transfers do."""

    def __init__(self, model, policy, batch_size):
        super().__init__(model, policy.tokenizer, batch_size, policy.dtype, is_shared=False)
        self.staged, self.numbers = {}, itertools.count()

    def stage_weights(self, weights):
        version = f"version {next(self.numbers)}"
        self.staged[version] = {name: weight.clone() for name, weight in weights}
        return version

    def use_weights(self, version):
        self.load_weights(self.staged.pop(version).items())


def skip_second_use(monkeypatch, engine_class):
    """Has engines of that class keep the weights that they have, in the second call of `use_weights`."""
    real, calls = engine_class.use_weights, itertools.count(1)

    def use_weights(engine, version):
        if next(calls) != 2:
            real(engine, version)

    monkeypatch.setattr(engine_class, "use_weights", use_weights)
