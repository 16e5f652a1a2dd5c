"""The page at `/`: a conversation in the browser, in one document that loads nothing else.

`page.html` has the places, `page.css` the looks, `page.js` the conversation, and `markdown.js` makes nodes of a model's
text. `document.py` puts them together under a policy that allows these scripts alone.
"""
