"""MAC-Attention as an attention backend of SGLang: ``--attention-backend mac``."""
