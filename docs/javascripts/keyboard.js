// What scrolls sideways can be scrolled by the keyboard, and the search dialog has a name.
window.addEventListener("load", () => {
  document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
  // the theme wraps tables after this event
  setTimeout(() => {
    document.querySelectorAll(".md-typeset pre > code, .md-typeset__scrollwrap").forEach((part) => {
      part.tabIndex = 0;
    });
  });
});
