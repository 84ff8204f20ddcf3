"""The learner: the model, its policy under DeepSpeed, batches, and the step that updates it."""
