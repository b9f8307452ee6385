/* Learn: the cells of a matrix become one URL parameter; keys move between them; pasting fills all. */
(() => {
  'use strict';
  const qa = window.qa;
  const place = (field) => JSON.parse(field.dataset.cell);
  let waiting = null;

  function gather(name) {
    const rows = [];
    document.querySelectorAll(`#content [data-cell]`).forEach((field) => {
      const at = place(field);
      if (at.name === name) (rows[at.row] = rows[at.row] || [])[at.column] = field.value.trim().replaceAll(/[;,\s]/g, '');
    });
    return rows.map((row) => row.join(',')).join(';');
  }
  function changed(name, text) {
    qa.setParams({ [name]: text }, { silent: true, replace: true });
    clearTimeout(waiting);
    waiting = setTimeout(() => qa.moved(), 60);
  }
  document.addEventListener('input', (event) => {
    if (event.target.dataset && event.target.dataset.cell) { const { name } = place(event.target); changed(name, gather(name)); }
  });
  document.addEventListener('paste', (event) => {
    const field = event.target;
    if (!field.dataset || !field.dataset.cell) return;
    const text = event.clipboardData.getData('text').trim();
    if (!/[\n\t;,]/.test(text)) return;
    event.preventDefault();
    field.blur();
    changed(place(field).name, text.split(/[\n;]/).map((row) => row.trim().split(/[,\s]+/).join(',')).join(';'));
  });
  document.addEventListener('keydown', (event) => {
    const field = event.target;
    if (!field.dataset || !field.dataset.cell || event.ctrlKey || event.metaKey || event.altKey) return;
    const { name, row, column } = place(field);
    const edge = { ArrowLeft: field.selectionStart === 0, ArrowRight: field.selectionEnd === field.value.length }[event.key];
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], Enter: [1, 0], ArrowLeft: edge && [0, -1], ArrowRight: edge && [0, 1] }[event.key];
    const next = step && document.getElementById(`${name}-${row + step[0]}-${column + step[1]}`);
    if (next) { event.preventDefault(); next.focus(); next.select(); }
  });
})();
