"""The page at `/`: a conversation in the browser, in one document that loads nothing else.

`page.html` has the places and `page.css` the looks. Of the scripts `blocks.js` and `markdown.js` make nodes of a
model's text, `server.js` asks the server, `turns.js` shows the conversation, and `page.js` has the controls.
`document.py` puts them together under a policy that allows these scripts alone.
"""
