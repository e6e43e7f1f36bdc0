"""Alibaba's PAI: what a training job finds there, and jobs and services from outside, by its own SDK."""
