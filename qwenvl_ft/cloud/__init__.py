"""Alibaba Cloud's PAI: its training jobs, from the inside."""
