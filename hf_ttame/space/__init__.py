"""The Space: a page on which anybody can look at explanations and test them.

uploads -> explainers -> analysis -> sessions is the logic and needs no gradio; rendering, routes and views turn it
into pictures and HTML; layout is the page, and its `launch` runs it.
"""
