"""Train a head from the target's own words: prompts, answers, features, loss, trainer."""
