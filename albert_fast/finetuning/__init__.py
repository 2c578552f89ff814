"""Fine-tuning: an ALBERT and labelled examples -> a model for a task, its figures and its predictions."""
