// The keys of a page's buttons: each button names its own in data-key.
"use strict";
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (event.target instanceof HTMLInputElement) return;
  const button = document.querySelector(`button[data-key="${CSS.escape(event.key)}"]`);
  if (button === null || button.disabled) return;
  event.preventDefault();
  button.click();
});
// A form is sent once, however often it is pressed.
document.addEventListener("submit", (event) => {
  if (document.body.dataset.sent) event.preventDefault();
  document.body.dataset.sent = "yes";
});
window.addEventListener("pageshow", () => { delete document.body.dataset.sent; });
