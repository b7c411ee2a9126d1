"""Models for those who do not have this library: folders that transformers loads by itself.

``language_model`` writes the post-LLM as an ordinary causal language model, ``folder`` the whole model with the code
that it needs. That code is this library's own: ``bundle`` copies it from the components and from the three modules here
that transformers asks for, ``configuration_neo``, ``modeling_neo`` and ``processing_neo``. Only these import
transformers when they are loaded, and no other module of the library loads them.
"""
