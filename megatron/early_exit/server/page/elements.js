/**
 * Making and finding elements. Text is only ever set as text.
 */

/** Makes an element with properties and children, which are elements or text. */
export function make(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

/** The element with an id. */
export const byId = (id) => document.getElementById(id);
