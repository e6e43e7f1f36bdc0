"""Alibaba's PAI: training jobs and services, by its own SDK."""
