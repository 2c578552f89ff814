"""Pretraining: corpus -> token store -> masked examples -> training run."""
