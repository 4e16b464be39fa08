// Filters the posts by their kinds; the #fragment of the address takes the filters to other pages.
const filters = document.querySelector('.filters'), posts = document.querySelectorAll('.post');
const buttons = [...filters.querySelectorAll('input')];
const pages = [...document.querySelectorAll('.pages a')];
const current = pages.findIndex(link => link.hasAttribute('aria-current'));
const matches = (kinds, wanted) => wanted.every(kind => kinds.includes(kind));
const countPosts = (link, wanted) => link.dataset.counts.split(',').map(group => group.split(' '))
  .reduce((sum, [count, ...kinds]) => sum + (matches(kinds, wanted) ? Number(count) : 0), 0);

function show() {
  const wanted = buttons.filter(button => button.checked && button.value).map(({value}) => value);
  const hash = '#' + wanted.join('+'), counts = pages.map(link => countPosts(link, wanted));
  for (const post of posts) post.hidden = !matches(post.dataset.kinds.split(' '), wanted);
  pages.forEach((link, index) => {
    link.hash = hash;
    link.classList.toggle('empty', !counts[index]);
  });
  for (const link of document.querySelectorAll('.step a')) {  // skip pages without such posts
    const target = link.rel === 'next'
      ? counts.findIndex((count, index) => count && index > current)
      : counts.findLastIndex((count, index) => count && index < current);
    link.hidden = target < 0;
    if (target >= 0) link.href = pages[target].href;
  }
  const total = counts.reduce((sum, count) => sum + count, 0).toLocaleString('en');
  document.querySelector('.status').textContent = total + (total === '1' ? ' post' : ' posts') +
    (pages.length > 1 ? `, ${counts[current].toLocaleString('en')} of them on this page` : '');
  return hash;
}

function readHash() {
  const wanted = location.hash.slice(1).split('+');
  for (const button of buttons) button.checked = !button.value || wanted.includes(button.value);
  show();
}

filters.addEventListener('change', () => history.replaceState(null, '', show()));
addEventListener('hashchange', readHash);
filters.hidden = false;
readHash();
