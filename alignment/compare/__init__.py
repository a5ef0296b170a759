"""Comparison of outputs, stage by stage; nothing here runs a model."""
