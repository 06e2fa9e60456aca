"""Derive the files of a bundle again and compare: what a checksum cannot prove.

    mobilellm verify BUNDLE --source CHECKPOINT

Whoever changes a file can write its checksum anew. But every file is derived from others: an
artifact from the quantized checkpoint (`artifacts`), a manifest from the files and the recipe
(`manifests`), and the quantized checkpoint from its source (`source`). The same inputs give the
same bytes, so each file is made again in a scratch folder and compared.
"""
