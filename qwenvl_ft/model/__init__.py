"""Everything with weights that training, answering and export share."""
