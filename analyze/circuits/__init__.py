"""Attribution graphs of stored traces: what in a picture, a text and the layers below made a feature fire."""
