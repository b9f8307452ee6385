/* The arena's own keys and fields: a vote by arrow or number, Enter sends a prompt. */
(() => {
  'use strict';
  const qa = window.qa;
  const page = '/arena';
  const press = (selector) => document.querySelector(`.arena ${selector}`)?.click();
  const votes = [
    ['model_a', 'A is better', ['ArrowLeft', '1'], '← 1'],
    ['model_b', 'B is better', ['ArrowRight', '2'], '→ 2'],
    ['tie', 'Tie', ['ArrowDown', '3'], '↓ 3'],
    ['tie (bothbad)', 'Both are bad', ['ArrowUp', '4'], '↑ 4'],
  ];
  for (const [choice, words, [arrow, digit], shown] of votes) {
    const run = () => press(`[data-choice="${choice}"]:not([aria-disabled])`);
    qa.keys.push({ page, key: arrow, shown, words, run });
    qa.keys.push({ page, key: digit, words, run, again: true });
  }
  qa.keys.push({ page, key: 'n', words: 'Next battle', run: () => press('[data-next]') });
  qa.keys.push({ page, key: 's', words: 'Skip this battle', run: () => press('[data-skip]') });
  qa.keys.push({ page, key: 'u', words: 'Take the vote back', run: () => press('[data-undo]') });

  function ask() {
    const field = document.getElementById('arena-prompt');
    const button = document.querySelector('.arena [data-ask]');
    if (!field || !button || button.matches('[aria-disabled], [aria-busy]')) return;
    if (!field.value.trim()) { field.focus(); return; }
    button.setAttribute('aria-busy', 'true');
    qa.act({ ...JSON.parse(button.dataset.ask), prompt: field.value });
    field.value = '';
  }
  document.addEventListener('click', (event) => { if (event.target.closest?.('.arena [data-ask]')) ask(); });
  document.addEventListener('keydown', (event) => {
    if (event.target.id === 'arena-prompt' && event.key === 'Enter' && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      ask();
    }
  });

  /* After the vote the next battle is one key away; the countdown needs no server. */
  let focused = '';
  setInterval(() => {
    if (location.pathname.replace(/\/$/, '') !== page) return;
    const next = document.querySelector('.arena [data-next][data-battle]');
    if (next && next.dataset.battle !== focused && !document.activeElement?.matches('textarea, input, select')) {
      focused = next.dataset.battle;
      next.focus({ preventScroll: true });
    }
    document.querySelectorAll('.arena [data-until]').forEach((e) => {
      const left = Math.ceil(Number(e.dataset.until) - Date.now() / 1000);
      e.querySelector('.left').textContent = left > 0 ? `${left} s` : '';
      e.hidden = left <= 0;
    });
  }, 250);
})();
