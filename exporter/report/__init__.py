"""The report on one or several bundles: one HTML page that needs no network, or Markdown.

    mobilellm report nano.tar.zst -o report.html --markdown report.md

`subjects` reads the bundles; a module for each topic makes `blocks` of them (sections, tables,
figures); `page` writes the blocks as HTML, and `markdown` their tables as Markdown. The same
bundles give the same bytes.
"""
