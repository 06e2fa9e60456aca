"""Publish a bundle to a folder, an OCI registry or the model hub, each through its own client.

    mobilellm publish nano.tar.zst --to oci://localhost:5000/nano:1

`publish` decides what is written where; `folder`, `registry` and `hub` write it. Tokens come from
the clients' own stores, never from an argument.
"""
