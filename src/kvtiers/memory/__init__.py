"""Host and device memory that KV lies in. It maps, prefaults, binds and copies; who owns which bytes is `core`'s business."""
