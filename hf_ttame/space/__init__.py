"""The Space: a page on which anybody can look at explanations and test them.

uploads -> explainers -> analysis -> sessions is the logic and needs no gradio; rendering, routes and views turn it
into pictures and HTML; handlers are what a visitor can wish; layout and events are the page, serving runs it.
"""
